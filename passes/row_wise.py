"""Whether a module of one tensor treats every row alone, and all rows alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from tokenpass import torch_internals as internals
from tokenpass.dims import Axis, axes_of
from tokenpass.facts import Facts, lined_up
from tokenpass.graph import values_of
from tokenpass.passes.input_axes import varying_nodes
from tokenpass.passes.label_axes import label_axes
from tokenpass.passes.normalise import DECOMPOSITIONS
from tokenpass.passes.token_wise import ALONE


def treats_rows_alone(module: nn.Module, x: Tensor) -> bool:
    """Whether row ``i`` of the result depends on row ``i`` of ``x`` only, and not on ``i``.

    Rows are what all dimensions but the last count. The module is traced on a fake of ``x``, and no
    operation may mix rows, change their order or meet them with a table of the same length.

    Args:
        module: Returns one tensor with the rows of its argument.
        x: ``(..., N, C)``.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    mode = FakeTensorMode(static_shapes=True, allow_non_fake_inputs=True)

    def run(x: Tensor, *values: Tensor) -> Any:
        return functional_call(module, dict(zip(state, values, strict=True)), (x,))

    try:
        with torch.inference_mode(False), torch.no_grad():
            fakes = [mode.from_tensor(value.detach()) for value in (x, *state.values())]
            graph = internals.trace(run, fakes, mode, DECOMPOSITIONS).graph
    except Exception:  # whatever a module does: what cannot be traced is not known
        return False
    source, *constants = graph.find_nodes(op="placeholder")
    facts = label_axes(graph, frozenset(constants))
    (output,) = graph.find_nodes(op="output")
    result, rows = output.args[0], facts.dims(source)[:-1]
    if not isinstance(result, fx.Node) or facts.dims(result)[:-1] != rows:
        return False
    varying = varying_nodes(facts, frozenset(constants))
    return all(_alone(facts, node, axes_of(rows), varying) for node in graph.nodes)


def _alone(facts: Facts, node: fx.Node, rows: frozenset[Axis], varying: frozenset[fx.Node]) -> bool:
    if node not in varying or node.op != "call_function":
        return True
    effect = facts.effects[node]
    if effect.what not in ALONE or effect.mixed & rows or len(values_of(node)) != 1:
        return False
    return not any(
        axes_of([line]) & rows and own
        for source, seen in facts.seen(node)
        if source not in varying
        for own, line in zip(facts.dims(source), lined_up(facts.dims(source), seen), strict=True)
    )
