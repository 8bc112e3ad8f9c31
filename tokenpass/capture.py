"""A graph of Dynamo or of ``torch.export`` as a canonical ATen graph.

The graph is traced again at the level of composite operators (``linear``, ``layer_norm``,
``scaled_dot_product_attention``): still differentiable, still before autocast. The many spellings
of a view come out as the few that the axis rules know (see :mod:`tokenpass.passes.normalise`).
Regions of autocast and of switched-off gradients become metadata of the nodes inside them, so that
a later pass may move a node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass import export_torch_internals as export_internals
from tokenpass import torch_internals as internals
from tokenpass.arrivals import Arrival, Arrivals
from tokenpass.errors import NotUnderstoodError
from tokenpass.flex import without_flex_attention

REGION = "tokenpass_region"


@dataclass(frozen=True)
class Region:
    """What surrounds a node: arguments of ``torch.autocast``, outermost first, and grad mode."""

    autocast: tuple[tuple[Any, ...], ...] = ()
    grad: bool | None = None


@dataclass(frozen=True)
class Captured:
    """A canonical graph with what is needed to trace it again.

    Attributes:
        module: The graph; every node has its fake value in ``meta["val"]``.
        constants: Placeholders that are parameters or buffers of the model.
        inputs: Fakes of the graph's inputs.
        mode: The fake mode that they live in.
        fixable: Whether sizes that are symbolic may be fixed to those at hand.
        arrivals: What is known of each input that another graph handed over.
    """

    module: fx.GraphModule
    constants: frozenset[fx.Node]
    inputs: tuple[Any, ...]
    mode: FakeTensorMode
    fixable: bool
    arrivals: Arrivals = ()

    def arrived(self) -> dict[fx.Node, Arrival]:
        """The placeholders of which something is known."""
        placeholders = self.module.graph.find_nodes(op="placeholder")
        pairs = zip(placeholders, self.arrivals, strict=False)
        return {node: arrival for node, arrival in pairs if arrival}

    @property
    def is_piece(self) -> bool:
        """Whether this is a piece of a model: tokens come from another graph."""
        return bool(self.arrived())


@dataclass(frozen=True)
class GraphInputs:
    """What a graph is traced again on.

    Attributes:
        fakes: One for each placeholder, all in ``mode``.
        constants: Which of them are parameters or buffers of the model.
        mode: A fake mode.
        fixable: Whether sizes that are symbolic may be fixed to those at hand.
        arrivals: What is known of each one that another graph handed over.
    """

    fakes: tuple[Any, ...]
    constants: frozenset[int]
    mode: FakeTensorMode
    fixable: bool
    arrivals: Arrivals = ()


def dynamo_inputs(
    module: fx.GraphModule, values: Sequence[Any], arrivals: Arrivals = ()
) -> GraphInputs:
    """The inputs of Dynamo's graph, from its example inputs."""
    mode = internals.current_fake_mode()
    placeholders = module.graph.find_nodes(op="placeholder")
    pairs = enumerate(zip(placeholders, values, strict=True))
    return GraphInputs(
        tuple(internals.fake_inputs(mode, placeholders, values)),
        frozenset(i for i, (node, value) in pairs if internals.is_model_state(node, value)),
        mode,
        fixable=True,
        arrivals=arrivals,
    )


class Capturing(fx.Interpreter):
    """Runs a graph, entering its regions of autocast and of switched gradients for real."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._entered: dict[fx.Node, torch.autocast] = {}

    def run_node(self, n: fx.Node) -> Any:
        if internals.is_enter_autocast(n.target):
            self._entered[n] = torch.autocast(*n.args)  # type: ignore[arg-type]
            return self._entered[n].__enter__()  # type: ignore[no-untyped-call]
        if internals.is_exit_autocast(n.target):
            return self._entered.pop(n.args[0]).__exit__(None, None, None)  # type: ignore[arg-type]
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        again = internals.checkpointed(target, args)
        if again is not None:
            body, operands = again
            return Capturing(body).run(*operands)
        region = export_internals.wrapped_region(target, args)
        if region is None:
            return super().call_function(target, args, kwargs)
        context, body, operands = region
        with context:
            return Capturing(body).run(*operands)


def capture(
    module: fx.GraphModule,
    inputs: GraphInputs,
    decompositions: Mapping[Any, Callable[..., Any]],
) -> Captured:
    """Trace a graph again.

    Args:
        module: The graph, from Dynamo or from ``torch.export``.
        inputs: What it is traced on.
        decompositions: Operators to be replaced while tracing.

    Raises:
        NotUnderstoodError: If the graph holds what cannot be traced again.
    """
    _refuse_nested(module.graph)
    _refuse_wrappers(inputs)
    run = Capturing(without_flex_attention(module)).run
    return _captured(run, inputs, decompositions)


def recapture(captured: Captured, run: Callable[..., Any]) -> Captured:
    """The canonical graph of ``run``, which takes what ``captured`` takes."""
    placeholders = captured.module.graph.find_nodes(op="placeholder")
    constants = frozenset(i for i, node in enumerate(placeholders) if node in captured.constants)
    inputs = GraphInputs(
        captured.inputs, constants, captured.mode, captured.fixable, captured.arrivals
    )
    return _captured(run, inputs)


def _captured(
    run: Callable[..., Any],
    inputs: GraphInputs,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Captured:
    traced = internals.trace(run, inputs.fakes, inputs.mode, decompositions)
    placeholders = traced.graph.find_nodes(op="placeholder")
    constants = frozenset(placeholders[number] for number in inputs.constants)
    _mark_regions(traced.graph)
    traced.recompile()
    return Captured(traced, constants, inputs.fakes, inputs.mode, inputs.fixable, inputs.arrivals)


def _refuse_nested(graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(value, torch.Tensor) and value.is_nested:
            raise NotUnderstoodError(
                f"{node.name} is a nested tensor; only strided ones are known: pad what is in it"
            )


def _refuse_wrappers(inputs: GraphInputs) -> None:
    """A wrapper's operators would be traced as what they do to tensors that are no input."""
    for value in inputs.fakes:
        if compiler_internals.is_wrapper(value):
            raise NotUnderstoodError(
                f"an input is a {type(value).__name__}, which wraps other tensors; such inputs are "
                "opened where they need no gradients and override __torch_function__"
            )


def _mark_regions(graph: fx.Graph) -> None:
    """Turn the nodes that switch autocast or gradients into metadata of the nodes between them."""
    autocast: dict[fx.Node, tuple[Any, ...]] = {}
    grad: bool | None = None
    switches: list[fx.Node] = []
    for node in graph.nodes:
        if internals.is_enter_autocast(node.target):
            autocast[node] = node.args
        elif internals.is_exit_autocast(node.target):
            del autocast[node.args[0]]
        elif internals.is_set_grad(node.target):
            grad = None if node.args[0] == torch.is_grad_enabled() else node.args[0]
        else:
            if autocast or grad is not None:
                node.meta[REGION] = Region(tuple(autocast.values()), grad)
            continue
        switches.append(node)
    for node in reversed(switches):
        graph.erase_node(node)


@contextlib.contextmanager
def in_region_of(node: fx.Node) -> Iterator[None]:
    """The autocast and gradient modes that ``node`` was captured in."""
    region = node.meta.get(REGION, Region())
    with contextlib.ExitStack() as stack:
        for args in region.autocast:
            stack.enter_context(torch.autocast(*args))
        if region.grad is not None:
            stack.enter_context(torch.set_grad_enabled(region.grad))
        yield
