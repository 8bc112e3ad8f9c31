"""Hold what the axis analysis says of a node against what the node computes.

An :class:`Effect` claims: an axis that is not in ``mixed`` keeps its positions apart. So other
values at position ``i`` of that axis may change the result only where the result carries ``i``.
Where a dimension carries which position is worked out here from the definitions of digits,
concatenations, slices and rolls, one position after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx

from tests.captured import Traced
from tokenpass.dims import Axis, Dim, Dims, Kind
from tokenpass.facts import Effect, lined_up
from tokenpass.graph import operands

Digit = tuple[Axis, int, int, int]
"""Axis, stride, size, value."""

DERIVED = (Kind.CONCAT, Kind.SLICE, Kind.ROLL)

TOLERANCE = 1e-9
"""Values are float64 and of order one: a real influence is many orders above rounding."""


def length(dim: Dim) -> int:
    """Positions along a dimension of known size."""
    total = 1
    for factor in dim:
        total *= int(factor.size)
    return total


def origins(dim: Dim) -> list[set[Digit]]:
    """For each position of ``dim``, the digits of axes that it stands for."""
    found: list[set[Digit]] = [set()]
    for factor in dim:
        stride, size = int(factor.stride), int(factor.size)
        digits = [_origin(factor.axis, stride, size, value) for value in range(size)]
        found = [before | digit for before in found for digit in digits]
    return found


def _origin(axis: Axis, stride: int, size: int, value: int) -> set[Digit]:
    whole = stride == 1 and size == int(axis.size)
    if axis.kind is Kind.CONCAT and whole:
        return [digits for part in axis.parts for digits in origins(part)][value]
    if axis.kind is Kind.SLICE and whole:
        return origins(axis.source)[value + int(axis.offset)]
    if axis.kind is Kind.ROLL and whole:
        return origins(axis.source)[(value - int(axis.offset)) % size]
    return {(axis, stride, size, value)}


def stems_from(axis: Axis) -> set[Axis]:
    """``axis`` and every axis that its positions are taken from."""
    inner = [f.axis for dim in (*axis.parts, axis.source) for f in dim]
    return {axis}.union(*(stems_from(other) for other in inner))


def carrying(dims: Dims, axis: Axis, position: int) -> Tensor:
    """Which elements of a tensor with ``dims`` carry ``position`` of ``axis``.

    Different digits must all agree, as far as an element has them (a class token has no row); where
    a digit occurs twice (the scores of self-attention), one occurrence is enough.
    """
    shape = [length(dim) for dim in dims]
    found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for place, dim in enumerate(dims):
        held = [{d for d in digits if d[0] is axis} for digits in origins(dim)]
        for key in {(d[1], d[2]) for digits in held for d in digits}:
            stride, size = key
            wanted = (axis, stride, size, position // stride % size)
            facts = (
                [any(d[1:3] == key for d in digits) for digits in held],
                [wanted in digits for digits in held],
            )
            along = [-1 if p == place else 1 for p in range(len(dims))]
            pair = [torch.tensor(x).reshape(along).expand(shape) for x in facts]
            known = next((k for k in found if _overlap(k, key)), key)
            if known in found:
                pair = [a | b for a, b in zip(pair, found[known], strict=True)]
            found[known] = (pair[0], pair[1])
    nothing = torch.zeros(shape, dtype=torch.bool)
    carried, contradicted = nothing, nothing
    for has, agrees in found.values():
        carried = carried | has
        contradicted = contradicted | (has & ~agrees)
    return carried & ~contradicted


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two digits, each a stride and a size, tell of the same part of an index."""
    return a[0] < b[0] * b[1] and b[0] < a[0] * a[1]


def violations(traced: Traced) -> list[str]:
    """Every claim about a node of the graph that its values contradict."""
    values = traced.values()
    found: list[str] = []
    for node in traced.graph.nodes:
        effect = traced.facts.effects[node]
        results = _tensors(values[node])
        sizes = [tuple(length(dim) for dim in dims) for dims in effect.outs]
        if node.op != "output" and sizes != [tuple(result.shape) for result in results]:
            found.append(f"{node}: sizes {sizes} of {[tuple(r.shape) for r in results]}")
        if node.op == "call_function" and results:
            found += _wrong_claims(traced, node, effect, values)
    return found


def _wrong_claims(
    traced: Traced, node: fx.Node, effect: Effect, values: dict[fx.Node, Any]
) -> Iterator[str]:
    mixed = {axis for outer in effect.mixed for axis in stems_from(outer)}
    sources = operands(node)
    before = _tensors(_call(node, values))
    for source, seen in zip(sources, effect.seen, strict=True):
        outs = traced.facts.effects[source].outs
        if len(outs) != 1 or sources.count(source) != 1:
            continue
        (own,) = outs
        named = [own]
        if len(seen) >= len(own):
            line = lined_up(own, seen)
            named.append(tuple(b if a else () for a, b in zip(own, line, strict=True)))
        for dims in dict.fromkeys(named):
            if [length(dim) for dim in dims] != list(values[source].shape):
                yield f"{node}: {source} lines up with dimensions of other sizes"
                continue
            for axis in _claimed(dims, effect.outs, mixed):
                for position in {0, 1, int(axis.size) - 1}:
                    other = dict(values)
                    where = carrying(dims, axis, position)
                    other[source] = _disturbed(values[source], where)
                    after = _tensors(_call(node, other))
                    for out, a, b in zip(effect.outs, before, after, strict=True):
                        reached = _differs(a, b) & ~carrying(out, axis, position)
                        if reached.any():
                            yield f"{node}: {source} at {position} of {axis} reaches elsewhere"


def _claimed(dims: Dims, outs: tuple[Dims, ...], mixed: set[Axis]) -> set[Axis]:
    """Primitive axes from the input that the effect says are kept apart.

    Left out are axes of which it cannot be told here what an element carries: hidden in a digit of
    a concatenation, or there twice and split into digits.
    """
    tensors = (dims, *outs)
    all_digits = {d for ds in tensors for dim in ds for digits in origins(dim) for d in digits}
    hidden = {a for d in all_digits if d[0].kind in DERIVED for a in stems_from(d[0])}
    held = {d[0] for dim in dims for digits in origins(dim) for d in digits}
    known = {axis for axis in held if axis.data and axis not in mixed | hidden}
    return {axis for axis in known if not any(_ambiguous(ds, axis) for ds in tensors)}


def _ambiguous(dims: Dims, axis: Axis) -> bool:
    """Whether an axis occurs twice in a tensor, in pieces."""
    times: Counter[tuple[int, int]] = Counter()
    for dim in dims:
        here: Counter[tuple[int, int]] = Counter()
        for digits in origins(dim):
            here |= Counter((d[1], d[2]) for d in digits if d[0] is axis)
        times += here
    pairs = combinations(times, 2)
    twice = max(times.values(), default=0) > 1 or any(_overlap(a, b) for a, b in pairs)
    return twice and len(times) > 1


def _disturbed(value: Tensor, where: Tensor) -> Tensor:
    """Other values of the same kind at some places."""
    if value.dtype == torch.bool:
        return value ^ where
    if not (value.is_floating_point() or value.is_complex()):
        shuffled = value.reshape(-1)[torch.randperm(value.numel())].reshape(value.shape)
        return torch.where(where, shuffled, value)
    return torch.where(where, value + torch.randn_like(value), value)


def _differs(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.bool:
        return a ^ b
    return ~torch.isclose(a, b, rtol=0.0, atol=TOLERANCE, equal_nan=True)


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def produce(source: fx.Node) -> Any:
        value = values[source]
        return value.clone() if isinstance(value, Tensor) else value

    args, kwargs = fx.map_arg((node.args, node.kwargs), produce)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _tensors(value: Any) -> list[Tensor]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if isinstance(item, Tensor)]
