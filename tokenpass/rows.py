"""Tensors as rows, one for each token of each image, wherever tokens and images lie in them.

A *token set* is some digits of axes whose positions together are the tokens of an image: one axis
with class token and patches, say, or rows and columns of windows. A value *carries* it if its
dimensions hold every position of these digits exactly once. With only some of the tokens such a
value has the same dimensions, except that one digit counts the tokens that are there, and all other
digits of the set and of the batch are one: operations that treat every token alone do not see a
difference.

Shapes: ``B`` images, ``N`` tokens of each, ``R`` rows at hand, ``F`` elements of a token.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from tokenpass.dims import Axis, Dims, Factor, axes_of, canonical, same, size_of
from tokenpass.facts import lined_up
from tokenpass.views import moved, permuted, reshaped

Digits = tuple[Factor, ...]


@dataclass(frozen=True)
class RowLayout:
    """How images and tokens lie in the values of a region.

    Attributes:
        batch: The images, one digit for each axis; empty for a batch of one.
        tokens: The tokens, one digit for each axis, the outermost first.
    """

    batch: Digits
    tokens: Digits

    @property
    def images(self) -> int:
        return _count(self.batch)

    @property
    def count(self) -> int:
        """``N``."""
        return _count(self.tokens)

    def carried_by(self, dims: Dims) -> bool:
        """Whether every image and every token is there, once."""
        return set(own_digits(dims, self.axes) or ()) == {*self.batch, *self.tokens}

    @property
    def axes(self) -> frozenset[Axis]:
        """All axes of images and tokens."""
        return frozenset(digit.axis for digit in (*self.batch, *self.tokens))

    def rows(self, x: Tensor, dims: Dims) -> Tensor:
        """All rows of a value that carries the set, ``(B * N, F)``."""
        digits = [factor for dim in dims for factor in dim]
        y = reshaped(x, [int(factor.size) for factor in digits])
        order = self._order(digits)
        return reshaped(permuted(y, order), [self.images * self.count, -1])

    def full(self, rows: Tensor, dims: Dims) -> Tensor:
        """``(B * N, F)`` as a value with dimensions ``dims``: the inverse of :meth:`rows`."""
        digits = [factor for dim in dims for factor in dim]
        order = self._order(digits)
        y = reshaped(rows, [int(digits[place].size) for place in order])
        back = permuted(y, [order.index(place) for place in range(len(digits))])
        return reshaped(back, [int(size_of(dim)) for dim in dims])

    def some(self, rows: Tensor, dims: Dims) -> Tensor:
        """``(R, F)`` with the dimensions that a value of some of the tokens has."""
        digits = [factor for dim in dims for factor in dim]
        lead = self._lead(digits)
        others = [place for place, factor in enumerate(digits) if not self._own(factor)]
        count = rows.shape[0]
        y = reshaped(rows, [count, *(int(digits[place].size) for place in others)])
        before = sum(place < lead for place in others)
        return reshaped(moved(y, 0, before), self.sizes(dims, count))

    def rows_of_some(self, x: Tensor, dims: Dims, count: int) -> Tensor:
        """The inverse of :meth:`some`: ``(R, F)``."""
        digits = [factor for dim in dims for factor in dim]
        lead = self._lead(digits)
        others = [place for place, factor in enumerate(digits) if not self._own(factor)]
        before = sum(place < lead for place in others)
        sizes = [int(digits[place].size) for place in others]
        y = reshaped(x, [*sizes[:before], count, *sizes[before:]])
        return reshaped(moved(y, before, 0), [count, -1])

    def sizes(self, dims: Dims, count: int) -> list[int]:
        """The shape of a value of ``count`` rows."""
        shape: list[int] = []
        for dim in dims:
            size = 1
            for factor in dim:
                others = 1 if self._own(factor) else int(factor.size)
                size = size * (count if self._leads(factor) else others)
            shape.append(size)
        return shape

    def meet(self, x: Tensor, own: Dims, seen: Dims, index: Tensor) -> Tensor:
        """A constant as it meets some of the tokens: a position table, with the rows of these.

        Args:
            x: The constant; all images share it.
            own: Its dimensions.
            seen: The dimensions of the computation, at least as many.
            index: The rows that are there, ``(R,)``.
        """
        lined = lined_up(own, seen)
        met = tuple(line if dim else () for dim, line in zip(own, lined, strict=True))
        tokens = {digit.axis for digit in self.tokens}
        if not any(factor.axis in tokens for dim in met for factor in dim):
            return x
        whole = ((),) * (len(seen) - len(own)) + met
        images = {digit.axis for digit in self.batch}

        def spread(axes: set[Axis]) -> Dims:
            """The constant's dimensions, and those of the computation that hold some axes."""
            pairs = zip(whole, seen, strict=True)
            return tuple(line if axes_of([line]) & axes else dim for dim, line in pairs)

        shared = not axes_of(spread(tokens)) & images
        dims = spread(tokens if shared else tokens | images)
        y = reshaped(x, (1,) * (len(seen) - len(own)) + tuple(x.shape))
        y = y.expand([int(size_of(dim)) for dim in dims])
        table = RowLayout((), self.tokens) if shared else self
        taken = index.remainder(self.count) if shared else index
        return self.some(table.rows(y, dims).index_select(0, taken), dims)

    def _own(self, factor: Factor) -> bool:
        return factor.axis in self.axes

    def _order(self, digits: Sequence[Factor]) -> list[int]:
        """Places of the images' digits, then of the tokens', then of all others."""
        rank = {digit.axis: place for place, digit in enumerate((*self.batch, *self.tokens))}
        own = [place for place, factor in enumerate(digits) if factor.axis in rank]
        own.sort(key=lambda p: (rank[digits[p].axis], -int(digits[p].stride)))
        return [*own, *(place for place in range(len(digits)) if place not in own)]

    def _leads(self, factor: Factor) -> bool:
        """Whether a digit counts the tokens: the outermost one of the first axis."""
        first = self.tokens[0]
        return factor.axis is first.axis and same(
            factor.stride * factor.size, first.stride * first.size
        )

    def _lead(self, digits: Sequence[Factor]) -> int:
        (place,) = (place for place, factor in enumerate(digits) if self._leads(factor))
        return place


def own_digits(dims: Dims, axes: Collection[Axis]) -> Digits | None:
    """What ``dims`` hold of some axes, one digit for each, in order of appearance.

    ``None`` where they hold pieces of an axis that are no digit.
    """
    found: dict[Axis, list[Factor]] = {}
    for dim in dims:
        for factor in dim:
            if factor.axis in axes:
                found.setdefault(factor.axis, []).append(factor)
    digits: list[Factor] = []
    for axis, pieces in found.items():
        inner_last = sorted(pieces, key=lambda factor: int(factor.stride), reverse=True)
        merged = canonical(inner_last)
        if len(merged) != 1:
            return None
        digits.append(Factor(axis, merged[0].stride, merged[0].size))
    return tuple(digits)


def _count(digits: Digits) -> int:
    return math.prod(int(digit.size) for digit in digits)
