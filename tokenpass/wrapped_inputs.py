"""Graph inputs that wrap other tensors, as quantised weights do, as the tensors that they wrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from tokenpass import compiler_torch_internals as compiler_internals

Run = Callable[..., Any]
Compile = Callable[[fx.GraphModule, Sequence[Any]], Run]


class Rewrap(torch.nn.Module):
    """The tensor of a wrapper's kind from the tensors that it wraps.

    Args:
        example: Such a wrapper.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.kind = type(example)
        self.names, self.context = compiler_internals.wrapped_names(example)
        self.size, self.strides = example.size(), example.stride()

    def forward(self, *wrapped: Tensor) -> Tensor:
        inner = dict(zip(self.names, wrapped, strict=True))
        made: Tensor = self.kind.__tensor_unflatten__(  # type: ignore[attr-defined]
            inner, self.context, self.size, self.strides
        )
        return made


def compile_unwrapped(compiling: Compile, module: fx.GraphModule, inputs: Sequence[Any]) -> Run:
    """Compile a graph for plain tensors, which the passes see through to.

    Args:
        compiling: Compiles a graph.
        module: From Dynamo.
        inputs: Its example inputs. Wrappers that need gradients, which belong to them, stay what
            they are; so do those that only answer operators that are dispatched, behind where
            graphs are traced.

    Returns:
        What takes inputs like ``inputs``.
    """
    if not any(_opens(x) for x in inputs):
        return compiling(module, inputs)
    places = [_places(x) for x in inputs]

    def unwrapped(values: Sequence[Any]) -> list[Any]:
        pairs = zip(values, places, strict=True)
        return [reduce(getattr, path, value) for value, paths in pairs for path in paths]

    run = compiling(_taking_plain_tensors(module, inputs), unwrapped(inputs))

    def opened(*values: Any) -> Any:
        return run(*unwrapped(values))

    return opened


def _opens(value: Any) -> bool:
    if not compiler_internals.is_wrapper(value) or value.requires_grad:
        return False
    return compiler_internals.answers_functions(value)


def _places(value: Any) -> list[tuple[str, ...]]:
    """Attributes that lead to what is wrapped; none of them to what wraps nothing."""
    if not _opens(value):
        return [()]
    names, _ = compiler_internals.wrapped_names(value)
    return [(name, *path) for name in names for path in _places(getattr(value, name))]


def _taking_plain_tensors(module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The same graph, with an input for each tensor that is wrapped."""
    plain = fx.GraphModule(module, fx.Graph())
    made: dict[fx.Node, fx.Node] = {}
    places = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            source = getattr(node, "_dynamo_source", None)
            made[node] = _input(plain, node.name, next(places), source, node)
        else:
            made[node] = plain.graph.node_copy(node, lambda n: made[n])
    plain.recompile()
    return plain


def _input(
    plain: fx.GraphModule, name: str, value: Any, source: Any, original: fx.Node | None
) -> fx.Node:
    if not _opens(value):
        node = plain.graph.placeholder(name)
        node.meta = dict(original.meta) if original is not None else {"example_value": value}
        node._dynamo_source = source
        return node
    inner = [
        _input(
            plain,
            f"{name}_{part}",
            getattr(value, part),
            compiler_internals.attribute_source(source, part),
            None,
        )
        for part in compiler_internals.wrapped_names(value)[0]
    ]
    plain.add_submodule(f"rewrap_{name}", Rewrap(value))
    return plain.graph.call_module(f"rewrap_{name}", tuple(inner))
