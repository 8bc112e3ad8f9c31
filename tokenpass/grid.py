"""The patch tokens of a model: which axes they run along, and where a dimension carries them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import sympy
from torch import fx

from tokenpass import reasons
from tokenpass.dims import (
    Axis,
    Dim,
    Dims,
    Factor,
    Kind,
    Size,
    axes_of,
    concat_axis,
    is_data,
    made_of,
    parts_of,
    same,
    size_of,
)


class Tokens(Protocol):
    """What a pattern asks of the tokens that it looks for."""

    def carried_by(self, dim: Dim) -> bool:
        """Whether a dimension tells tokens apart."""

    def carried_in(self, dims: Dims) -> list[int]:
        """The places of the dimensions that do."""

    def touched_by(self, axis: Axis) -> bool:
        """Whether positions along ``axis`` stand for tokens, or for parts of them."""

    def made_by(self, node: fx.Node, dims: Dims) -> bool:
        """Whether ``node``, whose result has ``dims``, makes the positions of the tokens."""


@dataclass(frozen=True)
class AnyTokens:
    """Everything that comes from the input and does not tell images apart.

    Attributes:
        images: The axes of the batch, and input axes that are channels.
    """

    images: frozenset[Axis]

    def carried_by(self, dim: Dim) -> bool:
        return any(self.touched_by(factor.axis) for factor in dim)

    def carried_in(self, dims: Dims) -> list[int]:
        return [place for place, dim in enumerate(dims) if self.carried_by(dim)]

    def touched_by(self, axis: Axis) -> bool:
        return axis.data and axis not in self.images

    def made_by(self, node: fx.Node, dims: Dims) -> bool:
        return any(factor.axis.node is node for dim in dims for factor in dim)


@dataclass(frozen=True)
class Grid:
    """The patch tokens as a dimension: rows and columns (and frames) of the image.

    Attributes:
        dim: The product of the axes that the tokens run along, as in ``(H, W)``.
    """

    dim: Dim

    @property
    def shape(self) -> tuple[Size, ...]:
        """Tokens along each axis: ``(H, W)`` or ``(T, H, W)``; ``(1, N)`` for a single axis."""
        sizes = tuple(factor.size for factor in self.dim)
        return sizes if len(sizes) > 1 else (sympy.Integer(1), *sizes)

    @property
    def count(self) -> Size:
        return size_of(self.dim)

    def carried_by(self, dim: Dim) -> bool:
        """Whether the grid runs along ``dim`` as a whole: alone, in a product or among parts."""
        return any(unit.holds_grid for unit in self.units(dim))

    def carried_in(self, dims: Dims) -> list[int]:
        return [place for place, dim in enumerate(dims) if self.carried_by(dim)]

    def touched_by(self, axis: Axis) -> bool:
        """Whether positions along ``axis`` stand for patch tokens, or for parts of the grid."""
        return not made_of([axis]).isdisjoint(axes_of([self.dim]))

    def made_by(self, node: fx.Node, dims: Dims) -> bool:
        return any(factor.axis.node is node for factor in self.dim)

    def token_unit(self, dim: Dim) -> Dim:
        """The piece of a dimension that holds the grid; there must be one."""
        (unit,) = (unit.dim for unit in self.units(dim) if unit.holds_grid)
        return unit

    def shredded_in(self, dims: Dims) -> bool:
        """Whether some dimension holds a piece of the grid without carrying all of it."""
        return any(self.touched_by(factor.axis) for dim in dims for factor in self._others(dim))

    def _others(self, dim: Dim) -> list[Factor]:
        return [factor for unit in self.units(dim) if not unit.holds_grid for factor in unit.dim]

    def units(self, dim: Dim) -> list[Unit]:
        """``dim`` as a product of pieces, those that hold the whole grid in one piece."""
        found: list[Unit] = []
        place = 0
        while place < len(dim):
            width = len(self.dim)
            if dim[place : place + width] == self.dim:
                found.append(Unit(self.dim, True))
                place += width
                continue
            single = dim[place : place + 1]
            axis = concat_axis(single)
            holds = axis is not None and any(self._is(part) for part in axis.parts)
            found.append(Unit(single, holds))
            place += 1
        return found

    def _is(self, part: Dim) -> bool:
        """Whether a part of a concatenation is the grid, or a concatenation with such a part.

        Frames and grid in one part are no grid: how many patch tokens an image has is not known.
        """
        axis = concat_axis(part)
        return part == self.dim or (axis is not None and any(self._is(p) for p in axis.parts))

    def layout(self, dim: Dim) -> list[Size | None]:
        """The parts of a unit that holds the grid, in order: their sizes, ``None`` for the grid."""
        axis = concat_axis(dim)
        if axis is None:
            return [None]
        sizes: list[Size | None] = []
        for part in axis.parts:
            sizes += self.layout(part) if self._is(part) else [size_of(part)]
        return sizes

    def resized(self, dim: Dim, count: Size) -> Size:
        """The size of ``dim`` if the grid had ``count`` tokens."""
        total: Size = sympy.Integer(1)
        for unit in self.units(dim):
            if not unit.holds_grid:
                total *= size_of(unit.dim)
                continue
            total *= sympy.Add(*(count if size is None else size for size in self.layout(unit.dim)))
        return total


@dataclass(frozen=True)
class Unit:
    """A factor of a dimension, or the run of factors that is the grid."""

    dim: Dim
    holds_grid: bool


def image_part(dim: Dim) -> Dim | str:
    """The patch tokens in a token dimension, or why there are none that can be trusted.

    Only positions that provably come from positions of the input image count: a dimension that
    arrives from outside the graph as one axis may hold class tokens that nobody can see.
    """
    grids = grids_in(dim)
    if len(grids) == 1:
        return grids[0]
    if len(grids) > 1:
        return reasons.several_grids(len(grids))
    return _why_not_spatial(max(parts_of(dim), key=lambda part: (is_data(part), len(part))))


def grids_in(dim: Dim) -> list[Dim]:
    """The parts of a token dimension whose positions provably are positions of an input image."""
    return [part for part in parts_of(dim) if not _why_not_spatial(part)]


def is_packed(dim: Dim) -> bool:
    """Whether a dimension holds patches of several images, or some neighbours among them.

    They are rows, or grids end to end, or images each of which has tokens beside its grid.
    """
    rows = bool(dim) and all(factor.axis.kind is Kind.PACKED for factor in dim)
    return rows or len(grids_in(dim)) > 1 or _with_tokens_beside(dim)


def _with_tokens_beside(dim: Dim) -> bool:
    joint = [factor for factor in dim if concat_axis((factor,)) is not None]
    images = [factor for factor in dim if factor.axis.kind is Kind.INPUT]
    return len(joint) == 1 and len(images) == len(dim) - 1 > 0 and bool(grids_in(tuple(joint)))


def _why_not_spatial(dim: Dim) -> str:
    """Empty if the positions of ``dim`` are positions of an image."""
    if not dim or not is_data(dim):
        return reasons.NO_TOKENS
    for factor in dim:
        if factor.axis.kind is Kind.SPATIAL:
            continue
        if factor.axis.kind is Kind.PACKED:
            return reasons.PACKED
        node = factor.axis.node.name if factor.axis.node else "the input"
        if factor.axis.kind is Kind.OPAQUE:
            return reasons.not_understood(node)
        if factor.axis.kind is not Kind.INPUT:
            return reasons.not_of_an_image(factor.axis.kind.value, node)
        if len(dim) == 1 and same(factor.size, factor.axis.size):
            return reasons.from_outside(node)
    return ""
