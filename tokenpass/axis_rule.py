"""What a rule of the axis analysis is given, and the steps that many rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import sympy
from torch import fx

from tokenpass.dims import (
    ONE,
    Axis,
    AxisTable,
    Dim,
    Dims,
    Kind,
    Size,
    axes_of,
    is_data,
    same,
    size_of,
    structure,
    whole,
)
from tokenpass.facts import Effect, What
from tokenpass.graph import expression, operands, shape_of, tensor_of, values_of

Shape = tuple[Size, ...]


class RuleContext:
    """The effects found so far, and a maker of axes."""

    def __init__(self, effects: dict[fx.Node, Effect], table: AxisTable) -> None:
        self._effects = effects
        self.table = table

    def dims(self, node: fx.Node) -> Dims:
        return self._effects[node].outs[0]

    def outs(self, node: fx.Node) -> tuple[Dims, ...]:
        return self._effects[node].outs

    def operand_dims(self, node: fx.Node) -> list[Dims]:
        return [self.dims(source) for source in operands(node)]

    def fresh(self, kind: Kind, size: Size, node: fx.Node, *, data: bool) -> Dim:
        return whole(Axis(kind, size, node, data))

    def fresh_dims(self, kind: Kind, shape: Shape, node: fx.Node, *, data: bool) -> Dims:
        return tuple(self.fresh(kind, size, node, data=data) for size in shape)

    def opaque(self, node: fx.Node, note: str) -> Effect:
        """Every dimension new, and everything mixed with everything."""
        seen = tuple(self.dims(source) for source in operands(node))
        mixed = axes_of(dim for dims in seen for dim in dims)
        data = any(axis.data for axis in mixed)
        kind = Kind.OPAQUE if data else Kind.CONSTANT
        outs = tuple(
            self.fresh_dims(kind, shape_of(value), node, data=data) for value in values_of(node)
        )
        return Effect(What.OPAQUE, outs, seen, mixed, note=note)


Rule = Callable[[RuleContext, fx.Node], Effect]


def out_shape(node: fx.Node) -> Shape:
    return shape_of(tensor_of(node))


def position(index: int, rank: int) -> int:
    """A dimension index as a number from zero up."""
    return index % rank if rank else 0


def join(candidates: Sequence[Dim]) -> tuple[Dim, frozenset[Axis]]:
    """The dimension along which elements of several operands meet, and what is lost by that.

    The best known of the candidates names the result. A constant that meets data loses its name and
    nothing else; data that meets other data is mixed with it. Of two products whose factors have
    the same sizes only the factors that differ are lost.
    """
    real = [dim for dim in candidates if dim]
    if not real:
        return (), frozenset()
    best = max(real, key=structure)
    others = [_unlike(dim, best) for dim in real if dim != best and is_data(dim)]
    return best, axes_of(others)


def _unlike(dim: Dim, best: Dim) -> Dim:
    """The factors of ``dim`` whose positions are not those of ``best``.

    From either end on, factors of the same sizes count the same positions.
    """
    first = _alike(dim, best)
    rest, other = dim[first:], best[first:]
    last = _alike(rest[::-1], other[::-1])
    middle = len(rest) - last
    pairs = [*zip(dim[:first], best, strict=False)]
    pairs += zip(rest[middle:], other[len(other) - last :], strict=True)
    return (*rest[:middle], *(a for a, b in pairs if a != b and a.axis.data))


def _alike(dim: Dim, best: Dim) -> int:
    """How many factors from the first on have the same sizes."""
    pairs = zip(dim, best, strict=False)
    return sum(1 for _ in takewhile(lambda pair: same(pair[0].size, pair[1].size), pairs))


def broadcast(operand_dims: Sequence[Dims], rank: int) -> tuple[Dims, frozenset[Axis]]:
    """The dimensions of an elementwise result of ``rank`` dimensions, and the axes mixed by it.

    Where names are equally good, those of a value win over those of a parameter.
    """
    outs: list[Dim] = []
    mixed: frozenset[Axis] = frozenset()
    ordered = sorted(operand_dims, key=lambda dims: not any(is_data(dim) for dim in dims))
    for place in range(-rank, 0):
        best, lost = join([dims[place] for dims in ordered if len(dims) >= -place])
        outs.append(best)
        mixed |= lost
    return tuple(outs), mixed


def right_aligned(frame: Dims, rank: int) -> Dims:
    """The last ``rank`` dimensions of a frame, as a broadcast operand of that rank sees it."""
    return frame[len(frame) - rank :] if rank else ()


def matches_shape(dims: Dims, shape: Shape) -> bool:
    return len(dims) == len(shape) and all(
        same(size_of(dim), size) for dim, size in zip(dims, shape, strict=True)
    )


def total(sizes: Sequence[Size]) -> Size:
    return sympy.Mul(*sizes) if sizes else ONE


def number(value: Any) -> Size:
    """An integer argument: a number, or a node that computes one."""
    return expression(value.meta["val"] if isinstance(value, fx.Node) else value)
