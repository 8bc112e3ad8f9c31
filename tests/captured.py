"""Graphs as the pipeline sees them, with the real values that went into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tokenpass.analysis import Analysis, analyse
from tokenpass.blocks import Found
from tokenpass.facts import Effect, Facts


@dataclass(frozen=True)
class Traced:
    """One graph of a function, understood.

    Attributes:
        analysis: What the pipeline made of it.
        inputs: The values of its placeholders in the call that was traced.
    """

    analysis: Analysis
    inputs: tuple[Any, ...]

    @property
    def facts(self) -> Facts:
        return self.analysis.facts

    @property
    def found(self) -> Found:
        return self.analysis.found

    @property
    def graph(self) -> fx.Graph:
        return self.analysis.captured.module.graph

    def nodes(self, target: Any) -> list[fx.Node]:
        """Calls of an operator, whatever its overload."""
        return [n for n in self.graph.nodes if getattr(n.target, "overloadpacket", None) is target]

    def effect(self, target: Any) -> Effect:
        """The effect of the only call of an operator."""
        (node,) = self.nodes(target)
        return self.facts.effects[node]

    def values(self) -> dict[fx.Node, Any]:
        """What every node computes, by running the canonical graph."""
        recorder = _Recorder(self.analysis.captured.module)
        recorder.run(*(x.clone() if isinstance(x, Tensor) else x for x in self.inputs))
        return recorder.values


class _Recorder(fx.Interpreter):
    """Keeps a copy of each value at the moment that it is computed."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def trace_all(
    function: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any
) -> list[Traced]:
    """All graphs that Dynamo makes of a call, analysed as the backend would."""
    found: list[Traced] = []

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        analysis = analyse(module, inputs, rewriting=False)

        def call(*values: Any) -> Any:
            found.append(Traced(analysis, values))
            return module.forward(*values)

        return call

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


def trace(function: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any) -> Traced:
    """The only graph of a call."""
    (found,) = trace_all(function, *args, dynamic=dynamic, **kwargs)
    return found


class Apply(nn.Module):
    """A function of an input and of named constants, as a module that owns the constants."""

    def __init__(self, function: Callable[..., Any], **constants: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, self)
