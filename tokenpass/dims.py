"""Dimensions as products of named axes: the language of the token-axis analysis.

An :class:`Axis` is one index set (the rows of the patch grid, the channels of a linear layer, the
batch). It has an identity, not a name: two axes of equal size are different axes. A *dimension* of
a tensor is a product of :class:`Factor`, row-major, outermost first; each factor is a digit of an
axis, ``index // stride % size``. A reshape only regroups factors, a permutation only moves
dimensions, and a dimension of size one has no factors at all.

``cat`` makes an axis with *parts*: the token axis of a model with a class token is
``[(), grid]``, and slicing it at a border of its parts gives the parts back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from typing import TypeAlias

import sympy
from torch import fx

Size: TypeAlias = sympy.Expr


class Kind(Enum):
    """How an axis came about."""

    INPUT = "dimension of an input"
    CONSTANT = "dimension of a parameter or of a computed constant"
    SPATIAL = "positions of a convolution, a pooling or a resize"
    PACKED = "patches of several images, one behind the other"
    CONCAT = "concatenation"
    SLICE = "slice"
    ROLL = "roll"
    OPAQUE = "result of an operation that the analysis does not understand"


@dataclass(frozen=True, eq=False, slots=True)
class Axis:
    """One index set. Compared by identity.

    Attributes:
        kind: How it came about.
        size: Number of positions.
        node: The node that made it.
        data: Whether it comes from the user's input (batch, rows, columns) and not from a constant.
        parts: For ``CONCAT``, the dimensions laid end to end.
        source: For ``SLICE`` and ``ROLL``, the dimension it was taken from.
        offset: For ``SLICE``, its first position; for ``ROLL``, the shift.
    """

    kind: Kind
    size: Size
    node: fx.Node | None
    data: bool
    parts: tuple[Dim, ...] = ()
    source: Dim = ()
    offset: Size = field(default=sympy.Integer(0))

    def __repr__(self) -> str:
        return f"<{self.kind.name.lower()} axis of {self.size} from {self.node}>"


@dataclass(frozen=True, slots=True)
class Factor:
    """The digit ``index // stride % size`` of an axis."""

    axis: Axis
    stride: Size
    size: Size


Dim = tuple[Factor, ...]
Dims = tuple[Dim, ...]

ONE = sympy.Integer(1)
ZERO = sympy.Integer(0)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value of their symbols."""
    if a == b:
        return True
    if a.is_Integer and b.is_Integer:
        return False
    return bool(sympy.expand(a - b) == 0)


def quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` where ``b`` provably divides ``a``, else ``None``."""
    if b.is_zero:
        return None
    if a.is_Integer and b.is_Integer:
        return a / b if a % b == 0 else None
    ratio = sympy.cancel(a / b)
    return ratio if sympy.fraction(ratio)[1] == 1 and not ratio.has(sympy.Pow) else None


def whole(axis: Axis) -> Dim:
    """The dimension that is all of ``axis``."""
    return () if same(axis.size, ONE) else (Factor(axis, ONE, axis.size),)


def size_of(dim: Dim) -> Size:
    return sympy.Mul(*(factor.size for factor in dim))


def canonical(factors: Iterable[Factor]) -> Dim:
    """Merge neighbouring digits of one axis and drop digits of size one."""
    merged: list[Factor] = []
    for factor in factors:
        if same(factor.size, ONE):
            continue
        last = merged[-1] if merged else None
        contiguous = last is not None and last.axis is factor.axis
        if last and contiguous and same(last.stride, factor.stride * factor.size):
            merged[-1] = Factor(factor.axis, factor.stride, last.size * factor.size)
        else:
            merged.append(factor)
    return tuple(merged)


def concat_axis(dim: Dim) -> Axis | None:
    """The concatenation that ``dim`` is all of, if it is one."""
    if len(dim) == 1 and dim[0].axis.parts and same(dim[0].size, dim[0].axis.size):
        return dim[0].axis
    return None


def parts_of(dim: Dim) -> Dims:
    """The dimensions laid end to end in ``dim`` (itself, where it is no concatenation)."""
    axis = concat_axis(dim)
    return axis.parts if axis else (dim,)


def axes_of(dims: Iterable[Dim]) -> frozenset[Axis]:
    return frozenset(factor.axis for dim in dims for factor in dim)


def made_of(axes: Iterable[Axis]) -> frozenset[Axis]:
    """``axes``, and all that they are parts of, or put together from."""
    found: set[Axis] = set()
    pending = list(axes)
    while pending:
        axis = pending.pop()
        if axis not in found:
            found.add(axis)
            pending += axes_of((*axis.parts, axis.source))
    return frozenset(found)


def is_data(dim: Dim) -> bool:
    return any(factor.axis.data for factor in dim)


def structure(dim: Dim) -> int:
    """How much is known of where a dimension comes from; the better known one names a sum."""
    if not dim:
        return 0
    if not is_data(dim):
        return 1
    raw = all(f.axis.kind in (Kind.INPUT, Kind.OPAQUE) for f in dim)
    return 2 if raw else 3


def regroup(dims: Sequence[Dim], sizes: Sequence[Size]) -> tuple[list[Dim | None], set[Axis]]:
    """The dimensions of a row-major reshape to ``sizes``.

    Returns one entry for each output dimension, ``None`` where it cannot be written as a product of
    digits, and the axes that such dimensions are made of.
    """
    result: list[Dim | None] = []
    lost: set[Axis] = set()
    pending = [factor for dim in dims for factor in dim]
    position = 0
    while position < len(sizes):
        if same(sizes[position], ONE):
            result.append(())
            position += 1
            continue
        stop, group = _smallest_group(pending, sizes, position)
        wanted = sizes[position:stop]
        split = _split(group, wanted)
        if split is None:
            lost |= {factor.axis for factor in group}
            result += [() if same(size, ONE) else None for size in wanted]
        else:
            result += split
        pending = pending[len(group) :]
        position = stop
    return result, lost


def _smallest_group(
    factors: Sequence[Factor], sizes: Sequence[Size], start: int
) -> tuple[int, list[Factor]]:
    """The fewest factors and sizes from ``start`` on that have the same product."""
    stop, taken = start + 1, 0
    inside, outside = ONE, sizes[start]
    while not same(inside, outside):
        more_factors, more_sizes = taken < len(factors), stop < len(sizes)
        if more_factors and (quotient(outside, inside) is not None or not more_sizes):
            inside *= factors[taken].size
            taken += 1
        elif more_sizes:
            outside *= sizes[stop]
            stop += 1
        else:
            return len(sizes), list(factors)
    return stop, list(factors[:taken])


def _split(factors: Sequence[Factor], sizes: Sequence[Size]) -> list[Dim] | None:
    """Distribute ``factors`` over ``sizes``, splitting a factor where a size ends inside it."""
    stack = list(reversed(factors))
    result: list[Dim] = []
    for size in sizes:
        dim: list[Factor] = []
        need = size
        while not same(need, ONE):
            if not stack:
                return None
            factor = stack.pop()
            rest = quotient(need, factor.size)
            if rest is not None:
                dim.append(factor)
                need = rest
                continue
            inner = quotient(factor.size, need)
            if inner is None:
                return None
            dim.append(Factor(factor.axis, factor.stride * inner, need))
            stack.append(Factor(factor.axis, factor.stride, inner))
            need = ONE
        result.append(canonical(dim))
    return None if stack else result


class AxisTable:
    """Makes the axes of one graph, the same one for the same construction."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Axis] = {}

    def learn(self, dims: Iterable[Dim]) -> None:
        """Take over how axes that come from elsewhere were made."""
        for axis in made_of(axes_of(dims)):
            if axis.kind is Kind.CONCAT:
                self._made.setdefault(("concat", *axis.parts), axis)
                for part in axis.parts:
                    if not is_data(part) and part:
                        self._made.setdefault(("constant", size_of(part)), part[0].axis)
            elif axis.kind is Kind.SLICE:
                stop = axis.offset + axis.size
                self._made.setdefault(("slice", axis.source, axis.offset, stop), axis)
            elif axis.kind is Kind.ROLL:
                self._made.setdefault(("roll", axis.source, axis.offset), axis)

    def concat(self, parts: Sequence[Dim], node: fx.Node | None) -> Dim:
        """``parts`` laid end to end; adjoining slices of one dimension become one again.

        So do neighbours that hold no data, beside some that do: two prefix tokens are the same two
        whether they come as one parameter, as two, or as one that was split and put together.
        """
        flat: list[Dim] = []
        for part in (piece for dim in parts for piece in parts_of(dim)):
            if same(size_of(part), ZERO):
                continue
            joined = self._join(flat[-1], part, node) if flat else None
            if joined is None:
                flat.append(part)
            else:
                flat[-1] = joined
        if any(is_data(part) for part in flat):
            flat = self._constants_joined(flat, node)
        if len(flat) <= 1:
            return flat[0] if flat else parts[0]
        key = ("concat", *flat)
        if key not in self._made:
            total = sympy.Add(*(size_of(part) for part in flat))
            data = any(is_data(part) for part in flat)
            self._made[key] = Axis(Kind.CONCAT, total, node, data, parts=tuple(flat))
        return whole(self._made[key])

    def _constants_joined(self, parts: Sequence[Dim], node: fx.Node | None) -> list[Dim]:
        """``parts`` with one axis for each run of those without data: only its size counts."""
        joined: list[Dim] = []
        for data, neighbours in groupby(parts, key=is_data):
            run = list(neighbours)
            joined += run if data else [self._constant(sum(map(size_of, run), ZERO), node)]
        return joined

    def _constant(self, size: Size, node: fx.Node | None) -> Dim:
        key = ("constant", size)
        if key not in self._made:
            self._made[key] = Axis(Kind.CONSTANT, size, node, data=False)
        return whole(self._made[key])

    def _join(self, left: Dim, right: Dim, node: fx.Node | None) -> Dim | None:
        first, second = (_as_slice(dim) for dim in (left, right))
        if first is None or second is None or first.source != second.source:
            return None
        if not same(first.offset + first.size, second.offset):
            return None
        return self.slice(first.source, first.offset, second.offset + second.size, node)

    def slice(self, dim: Dim, start: Size, stop: Size, node: fx.Node | None) -> Dim:
        """Positions ``start`` to ``stop`` of ``dim``."""
        if same(start, ZERO) and same(stop, size_of(dim)):
            return dim
        axis = concat_axis(dim)
        if axis is not None:
            return self._slice_parts(axis, start, stop, node)
        outer = _as_slice(dim)
        if outer is not None:
            return self.slice(outer.source, outer.offset + start, outer.offset + stop, node)
        key = ("slice", dim, start, stop)
        if key not in self._made:
            self._made[key] = Axis(
                Kind.SLICE, stop - start, node, is_data(dim), source=dim, offset=start
            )
        return whole(self._made[key])

    def _slice_parts(self, axis: Axis, start: Size, stop: Size, node: fx.Node | None) -> Dim:
        pieces: list[Dim] = []
        begin = ZERO
        for part in axis.parts:
            end = begin + size_of(part)
            low, high = sympy.Max(start, begin), sympy.Min(stop, end)
            if (high - low).is_positive or (same(low, begin) and same(high, end)):
                pieces.append(self.slice(part, low - begin, high - begin, node))
            elif not (high - low).is_nonpositive:
                return whole(Axis(Kind.OPAQUE, stop - start, node, axis.data))
            begin = end
        if not pieces:
            return whole(Axis(Kind.OPAQUE, ZERO, node, False))
        return self.concat(pieces, node)

    def roll(self, dim: Dim, shift: Size, node: fx.Node | None) -> Dim:
        """``dim`` rolled by ``shift``; rolling back gives ``dim`` again."""
        if len(dim) == 1 and dim[0].axis.kind is Kind.ROLL and same(dim[0].size, dim[0].axis.size):
            inner = dim[0].axis
            return self.roll(inner.source, inner.offset + shift, node)
        if same(shift, ZERO) or not dim:
            return dim
        key = ("roll", dim, shift)
        if key not in self._made:
            self._made[key] = Axis(
                Kind.ROLL, size_of(dim), node, is_data(dim), source=dim, offset=shift
            )
        return whole(self._made[key])


def _as_slice(dim: Dim) -> Axis | None:
    if len(dim) == 1 and dim[0].axis.kind is Kind.SLICE and same(dim[0].size, dim[0].axis.size):
        return dim[0].axis
    return None
