"""Small helpers on fx nodes; they know no operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from tokenpass.dims import Size


def expression(size: int | torch.SymInt) -> Size:
    """The size of a tensor dimension as a sympy expression."""
    if isinstance(size, torch.SymInt):
        return sympy.sympify(size.node.expr)
    return sympy.Integer(int(size))


def shape_of(value: torch.Tensor) -> tuple[Size, ...]:
    return tuple(expression(size) for size in value.shape)


def is_tensor(node: fx.Node) -> bool:
    """Whether ``node`` computes one tensor (and not a number, nothing, or several tensors)."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def tensor_of(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def values_of(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that ``node`` computes, in order."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [item for item in value if isinstance(item, torch.Tensor)]
    return []


def acts(node: fx.Node) -> bool:
    """Whether ``node`` computes neither tensors nor a number: an assertion, say."""
    number = isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))
    return node.op == "call_function" and not number and not values_of(node)


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes that ``node`` reads tensors from, in the order of its arguments, with repeats."""
    found: list[fx.Node] = []

    def visit(argument: fx.Node) -> fx.Node:
        if values_of(argument):
            found.append(argument)
        return argument

    fx.map_arg((node.args, node.kwargs), visit)
    return found


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen node by the names of its schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((item.name for item in schema), node.args, strict=False)) | node.kwargs
    missing = {i.name: i.default_value for i in schema if i.name not in given}
    return given | missing


def with_arguments(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], changes: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``args`` and ``kwargs`` of a call of ``node``'s operator with some arguments replaced."""
    if not changes:  # nor is there a schema where one of several results is taken
        return args, kwargs
    order = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    positional = list(args)
    for name, value in changes.items():
        if order.index(name) < len(positional):
            positional[order.index(name)] = value
        else:
            kwargs = {**kwargs, name: value}
    return tuple(positional), kwargs


def place(node: fx.Node) -> str:
    """Where in the user's model ``node`` comes from: the innermost line of its traced stack."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return lines[-1] if lines else ""


def short_place(line: str) -> str:
    """``File "/a/vision_transformer.py", line 85, in forward`` as ``vision_transformer.py:85``."""
    if not line.startswith("File "):
        return line
    path, number, *_ = line.removeprefix("File ").split(", ")
    return f"{path.strip(chr(34)).rsplit('/', 1)[-1]}:{number.removeprefix('line ')}"


def ancestors(graph: fx.Graph) -> Mapping[fx.Node, int]:
    """For each node a bit set of the nodes it is computed from; see :func:`depends`."""
    sets: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        bits = 1 << position
        for source in node.all_input_nodes:
            bits |= sets[source]
        sets[node] = bits
    return sets


def depends(sets: Mapping[fx.Node, int], node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` is computed from ``source`` (or is it)."""
    own = sets[source]
    return sets[node] & own == own


def unique(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(nodes))


def names(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(node.name for node in nodes)
