"""Hold a rewritten graph to its promises before it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokenpass import torch_internals as internals
from tokenpass.capture import Captured
from tokenpass.dims import same
from tokenpass.errors import BrokenInvariantError
from tokenpass.facts import Facts
from tokenpass.graph import expression
from tokenpass.passes.gate import Traced
from tokenpass.pruning import Pruning


def check_rewrite(
    captured: Captured, facts: Facts, plan: Pruning, module: fx.GraphModule, recorded: int = 0
) -> None:
    """Propagate the rewritten graph anew and compare its outputs with the original's.

    Args:
        captured: The original.
        facts: Of it.
        plan: The cuts.
        module: The rewritten graph.
        recorded: How many tensors it returns after its own outputs and the kept tokens.

    Raises:
        BrokenInvariantError: If the graph is malformed, an output is missing, or a shape, dtype or
            device differs from what it must be.
    """
    module.graph.lint()
    everything = internals.propagate(module, captured.inputs, captured.mode)
    *outputs, kept = everything[: len(everything) - recorded]
    before = _outputs(captured.module)
    after = [x for x in _leaves(outputs) if isinstance(x, torch.Tensor)]
    tensors = [node for node in before if isinstance(node.meta["val"], torch.Tensor)]
    if len(after) != len(tensors):
        raise BrokenInvariantError(
            f"{len(after)} output tensors after the rewrite, {len(tensors)} before"
        )
    for node, value in zip(tensors, after, strict=True):
        _check_output(facts, plan, node, value)
    _expect(kept.shape[-1], plan.stages[-1].count, "number of kept tokens")


def check_gated(captured: Captured, full: Traced, incremental: Traced) -> None:
    """Compare the outputs of both graphs of a gated model with the original's.

    Nothing is propagated anew: the graphs are as they were traced, from fake inputs.

    Raises:
        BrokenInvariantError: If a graph is malformed, an output is missing, or a shape, dtype or
            device differs from the original's.
    """
    for graph in (full, incremental):
        graph.module.graph.lint()
        _check_same(captured, [node.meta["val"] for node in _outputs(graph.module)])


def check_same_outputs(
    captured: Captured, module: fx.GraphModule, kept: int, recorded: int = 0
) -> None:
    """Propagate a partly pruned graph anew and compare its outputs with the original's.

    Args:
        captured: The original.
        module: The rewritten graph.
        kept: How many tokens it must say it kept, in an output after the original's.
        recorded: How many tensors it returns after that.

    Raises:
        BrokenInvariantError: If the graph is malformed, an output is missing, or a shape, dtype or
            device differs from the original's.
    """
    module.graph.lint()
    outputs = internals.propagate(module, captured.inputs, captured.mode)
    _check_same(captured, outputs)
    _expect(outputs[-1 - recorded].shape[-1], kept, "number of kept tokens")


def _check_same(captured: Captured, outputs: Any) -> None:
    before = _outputs(captured.module)
    tensors = [node for node in before if isinstance(node.meta["val"], torch.Tensor)]
    after = [x for x in _leaves(outputs) if isinstance(x, torch.Tensor)]
    if len(after) < len(tensors):
        raise BrokenInvariantError(
            f"{len(after)} output tensors after the rewrite, {len(tensors)} before"
        )
    for node, value in zip(tensors, after, strict=False):
        _check_kind(node, value)
        for place, size in enumerate(node.meta["val"].shape):
            _expect(value.shape[place], size, f"dimension {place} of output {node.name}")


def _outputs(module: fx.GraphModule) -> list[fx.Node]:
    (output,) = module.graph.find_nodes(op="output")
    return [node for node in _leaves(output.args[0]) if isinstance(node, fx.Node)]


def _leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def _check_kind(node: fx.Node, value: torch.Tensor) -> None:
    before = node.meta["val"]
    if value.dtype != before.dtype or value.device != before.device:
        raise BrokenInvariantError(
            f"output {node.name} became {value.dtype} on {value.device}, "
            f"was {before.dtype} on {before.device}"
        )
    if value.dim() != before.dim():
        raise BrokenInvariantError(
            f"output {node.name} has {value.dim()} dimensions, had {before.dim()}"
        )


def _check_output(facts: Facts, plan: Pruning, node: fx.Node, value: torch.Tensor) -> None:
    _check_kind(node, value)
    before = node.meta["val"]
    whole = plan.method.restores or not plan.carried_in([facts.dims(node)])
    count = plan.count(0 if whole else len(plan.stages))
    for place, dim in enumerate(facts.dims(node)):
        wanted = plan.grid.resized(dim, count) if plan.grid.carried_by(dim) else before.shape[place]
        _expect(value.shape[place], wanted, f"dimension {place} of output {node.name}")


def _expect(size: Any, wanted: Any, what: str) -> None:
    found = expression(size)
    expected = wanted if hasattr(wanted, "free_symbols") else expression(wanted)
    if not same(found, expected):
        raise BrokenInvariantError(f"{what} is {found}, must be {expected}")
