"""Reordering tensors whose dimensions are known: taking tokens out of them, wherever these lie.

Works on *units*: a dimension is split into its factors, the run of factors that is the grid (or a
concatenation that holds it) staying in one piece. ``B`` below is the product of the batch factors:
every image (and, where frames are folded into the batch, every frame) has its own set of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tokenpass.dims import Dim, Dims, Factor, Size, size_of
from tokenpass.facts import lined_up
from tokenpass.grid import Grid, Unit
from tokenpass.merging import take
from tokenpass.views import Extent, permuted, reshaped

ToExtent: TypeAlias = Callable[[Size], Extent]


@dataclass(frozen=True)
class Layout:
    """Where batch and patch tokens lie in the tensors of one graph.

    Attributes:
        grid: The patch tokens.
        batch: Factors of the batch, in order; empty for a batch of one.
        extent: Turns a size expression into an integer of the running trace.
    """

    grid: Grid
    batch: Dim
    extent: ToExtent

    def split(self, x: Tensor, dims: Dims) -> tuple[Tensor, list[list[Unit]]]:
        """``x`` with one dimension for each unit, and the units of each of its dimensions."""
        units = [self.grid.units(dim) for dim in dims]
        if all(len(group) == 1 for group in units):
            return x, units
        shape: list[Extent] = []
        for size, group in zip(x.shape, units, strict=True):
            shape += self._extents(size, group)
        return reshaped(x, shape), units

    def _extents(self, size: Extent, group: Sequence[Unit]) -> list[Extent]:
        """Sizes of the units of a dimension of ``size``; the grid takes what the others leave."""
        if len(group) == 1:
            return [size]
        others = [None if unit.holds_grid else self.extent(size_of(unit.dim)) for unit in group]
        rest = size
        for other in others:
            rest = rest if other is None else rest // other
        return [rest if other is None else other for other in others]

    def take(
        self,
        x: Tensor,
        dims: Dims,
        index: Callable[[Dim], Tensor],
        done: Collection[int] = (),
    ) -> Tensor:
        """``x`` with only some of its tokens, in every dimension that carries the grid.

        Args:
            x: A tensor with these ``dims``; has the batch among them, or the batch is one.
            dims: Its dimensions.
            index: Positions to take in a unit that holds the grid, ``(B, L)``.
            done: Dimensions that have only some of their tokens already.
        """
        y, units = self.split(x, dims)
        flat = [unit for group in units for unit in group]
        owner = [number for number, group in enumerate(units) for _ in group]
        for place, unit in enumerate(flat):
            if unit.holds_grid and owner[place] not in done:
                y = self._take_at(y, flat, place, index(unit.dim))
        return in_memory_order(self._join(y, units), x)

    def without_grid(self, x: Tensor, dims: Dims) -> Tensor:
        """``x`` without its patch tokens: prefix tokens only."""
        y, units = self.split(x, dims)
        for place, unit in enumerate(unit for group in units for unit in group):
            if unit.holds_grid:
                y = self._fixed_parts(y, place, self.grid.layout(unit.dim))
        return self._join(y, units)

    def _fixed_parts(self, y: Tensor, place: int, layout: Sequence[Size | None]) -> Tensor:
        total = y.shape[place]
        sizes = [None if size is None else self.extent(size) for size in layout]
        patches = total
        for size in sizes:
            patches = patches if size is None else patches - size
        pieces, start = [], 0
        for size in sizes:
            if size is not None:
                pieces.append(y.narrow(place, start, size))
            start = start + (patches if size is None else size)
        if not pieces:
            return y.narrow(place, 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, place)

    def positions(self, dim: Dim, patches: Tensor, before: Extent) -> Tensor:
        """Positions in a unit that holds the grid, of its fixed parts and of some patch tokens.

        Args:
            dim: The unit.
            patches: Positions among ``before`` patch tokens, ``(B, K)``.
            before: Patch tokens in the tensor that is taken from.

        Returns:
            ``(B, L)``.
        """
        pieces: list[Tensor] = []
        start: Extent = 0
        for size in self.grid.layout(dim):
            if size is None:
                pieces.append(patches + start if not _is_zero(start) else patches)
                start = start + before
                continue
            stop = start + self.extent(size)
            fixed = torch.arange(start, stop, device=patches.device)
            pieces.append(fixed.expand(patches.shape[0], -1))
            start = stop
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def overlay(
        self, full: Tensor | None, x: Tensor, dims: Dims, index: Callable[[Dim], Tensor]
    ) -> Tensor:
        """``full`` with some of its tokens replaced by those of ``x``.

        Args:
            full: All tokens, along one dimension; zeros, along any number, if ``None``.
            x: Fewer tokens, in the same dimensions otherwise.
            dims: The dimensions.
            index: Positions in ``full`` and ``x`` laid end to end, ``(B, N)``.
        """
        z, units = self.split(x, dims)
        flat = [unit for group in units for unit in group]
        for place in (p for p, unit in enumerate(flat) if unit.holds_grid):
            dim, sizes = flat[place].dim, list(z.shape)
            sizes[place] = self.extent(self.grid.resized(dim, self.grid.count))
            y = z.new_zeros(sizes) if full is None else self.split(full, dims)[0]
            z = self._take_at(torch.cat([y, z], place), flat, place, index(dim))
        return self._join(z, units)

    def heads(self, x: Tensor, dims: Dims, channel: int) -> Tensor:
        """Queries or keys as ``(B, h, N, d)``."""
        y, units = self.split(x, dims)
        order, a, b = self._head_order(units, channel)
        front = permuted(y, order)
        shape = front.shape
        sizes = [_product(shape[:a]), _product(shape[a:b]), shape[b], _product(shape[b + 1 :])]
        return reshaped(front, sizes)

    def from_heads(self, heads: Tensor, dims: Dims, channel: int) -> Tensor:
        """``(B, h, N, d)`` in dimensions ``dims``: the inverse of :meth:`heads`."""
        units = [self.grid.units(dim) for dim in dims]
        flat = [unit for group in units for unit in group]
        order, _, _ = self._head_order(units, channel)
        y = reshaped(heads, [self.extent(size_of(flat[place].dim)) for place in order])
        return self._join(permuted(y, [order.index(p) for p in range(len(flat))]), units)

    def _head_order(
        self, units: Sequence[Sequence[Unit]], channel: int
    ) -> tuple[list[int], int, int]:
        """Places of images, heads, tokens and channels, and where heads and tokens begin."""
        flat = [unit for group in units for unit in group]
        first = sum(len(group) for group in units[:channel])
        channels = list(range(first, first + len(units[channel])))
        (tokens,) = (p for p, unit in enumerate(flat) if unit.holds_grid)
        images = self._batch_places(flat)
        others = [p for p in range(len(flat)) if p not in (*images, tokens, *channels)]
        return [*images, *others, tokens, *channels], len(images), len(images) + len(others)

    def rows(self, x: Tensor, dims: Dims) -> Tensor:
        """The stream as ``(B, N, C)``."""
        y, units = self.split(x, dims)
        flat = [unit for group in units for unit in group]
        (tokens,) = (p for p, unit in enumerate(flat) if unit.holds_grid)
        images = self._batch_places(flat)
        others = [p for p in range(len(flat)) if p not in (*images, tokens)]
        front = permuted(y, [*images, tokens, *others])
        lead, shape = len(images), front.shape
        sizes = [_product(shape[:lead]), shape[lead], _product(shape[lead + 1 :])]
        return reshaped(front, sizes)

    def from_rows(self, rows: Tensor, x: Tensor, dims: Dims) -> Tensor:
        """``(B, K, C)`` back in the dimensions of ``x``, which :meth:`rows` was made of."""
        y, units = self.split(x, dims)
        flat = [unit for group in units for unit in group]
        (tokens,) = (p for p, unit in enumerate(flat) if unit.holds_grid)
        images = self._batch_places(flat)
        others = [p for p in range(len(flat)) if p not in (*images, tokens)]
        order = [*images, tokens, *others]
        sizes = [rows.shape[1] if p == tokens else y.shape[p] for p in order]
        back = permuted(reshaped(rows, sizes), [order.index(p) for p in range(len(flat))])
        return self._join(back, units)

    def score_map(self, x: Tensor, seen: Dims, key_place: int, count: Size) -> Tensor:
        """A mask as it broadcasts over scores of ``(B, h, Nq, Nk)``.

        Args:
            x: Broadcasts over dimensions ``seen``.
            seen: The dimensions of the scores.
            key_place: Which of them is that of the keys.
            count: Patch tokens in ``x``.
        """
        sizes = [self.extent(self.grid.resized(dim, count)) for dim in seen]
        y, units = self.split(x.expand(sizes), seen)
        flat = [unit for group in units for unit in group]
        keys = sum(len(group) for group in units[:key_place])
        images = self._batch_places(flat)
        queries = [p for p, unit in enumerate(flat) if unit.holds_grid and p != keys]
        others = [p for p in range(len(flat)) if p not in (*images, *queries, keys)]
        front = y.permute([*images, *others, *queries, keys])
        a, b = len(images), len(images) + len(others)
        return front.reshape(
            _product(front.shape[:a]),
            _product(front.shape[a:b]),
            _product(front.shape[b:-1]),
            front.shape[-1],
        )

    def column_mean(self, probabilities: Tensor, dims: Dims, place: int) -> Tensor:
        """Mean over all but the batch and the keys, which lie along ``place``: ``(B, Nk)``."""
        y, units = self.split(probabilities, dims)
        flat = [unit for group in units for unit in group]
        keys = sum(len(group) for group in units[:place])
        images = self._batch_places(flat)
        others = [p for p in range(len(flat)) if p not in (*images, keys)]
        front = y.permute([*images, *others, keys])
        return front.reshape(_product(front.shape[: len(images)]), -1, front.shape[-1]).mean(
            1, dtype=torch.float32
        )

    def align(self, rows: Tensor, place: int, seen: Dims) -> Tensor:
        """``rows`` ``(B, L)`` shaped to be broadcast: ``L`` along a place of ``seen``."""
        y = rows.reshape(
            rows.shape[0], *(rows.shape[1] if p == place else 1 for p in range(len(seen)))
        )
        if not self.batch:
            return y.squeeze(0)
        dims = tuple(dim if p == place else () for p, dim in enumerate(seen))
        return self._spread_batch(y, dims, seen)

    def _take_at(self, y: Tensor, flat: Sequence[Unit], place: int, index: Tensor) -> Tensor:
        """Take along one unit. ``y`` has one dimension for each unit."""
        images = self._batch_places(flat)
        rest = [p for p in range(len(flat)) if p not in images and p != place]
        order = [*images, place, *rest]
        front = permuted(y, order)
        sizes = front.shape
        lead = len(images)
        rows = reshaped(front, [index.shape[0], *sizes[lead:]])
        taken = reshaped(take(rows, index), [*sizes[:lead], index.shape[1], *sizes[lead + 1 :]])
        return permuted(taken, [order.index(p) for p in range(len(flat))])

    def _batch_places(self, flat: Sequence[Unit]) -> list[int]:
        places = {unit.dim[0]: p for p, unit in enumerate(flat) if unit.dim and not unit.holds_grid}
        return [places[factor] for factor in self.batch if factor in places]

    def _join(self, y: Tensor, units: Sequence[Sequence[Unit]]) -> Tensor:
        if all(len(group) == 1 for group in units):
            return y
        shape: list[Extent] = []
        place = 0
        for group in units:
            shape.append(_product(y.shape[place : place + len(group)]))
            place += len(group)
        return reshaped(y, shape)

    def meet(
        self,
        x: Tensor,
        own: Dims,
        seen: Dims,
        index: Callable[[Dim, int], Tensor],
        done: Collection[int] = (),
    ) -> Tensor:
        """A full operand as it must be to meet the remaining tokens of a computation.

        A position table ``(N, C)`` that is added to ``(B, K, C)`` becomes ``(B, K, C)``: each image
        needs the rows of its own tokens.

        Args:
            x: The operand, with all tokens.
            own: Its dimensions.
            seen: The dimensions of the computation, at least as many.
            index: Positions to take in a unit that holds the grid, at a place of ``seen``.
            done: Dimensions of the operand that have only some of their tokens already.
        """
        lined = lined_up(own, seen)
        named = tuple(line if dim else () for dim, line in zip(own, lined, strict=True))
        if not self.batch or self._has_batch(named):
            lead = len(seen) - len(own)
            missing = [place for place in self.grid.carried_in(named) if place not in done]
            places = iter([lead + place for place in missing])
            return self.take(x, named, lambda dim: index(dim, next(places)), done)
        return self._meet_each(x, named, seen, index)

    def _has_batch(self, dims: Dims) -> bool:
        factors = {factor for dim in dims for factor in dim}
        return all(factor in factors for factor in self.batch)

    def _meet_each(
        self, x: Tensor, named: Dims, seen: Dims, index: Callable[[Dim, int], Tensor]
    ) -> Tensor:
        """:meth:`meet` for an operand that all images share: the result has a batch."""
        padding = len(seen) - len(named)
        x = reshaped(x, (1,) * padding + tuple(x.shape))
        dims = ((),) * padding + named
        y: Tensor | None = None
        for place, dim in enumerate(dims):
            if not self.grid.carried_by(dim):
                continue
            positions = index(dim, place)
            if y is None:
                y = x.index_select(place, positions.reshape(-1))
                y = torch.unflatten(y, place, tuple(positions.shape)).movedim(place, 0)
            else:
                y = take(y.movedim(place + 1, 1), positions).movedim(1, place + 1)
        assert y is not None
        return self._spread_batch(y, dims, seen)

    def _spread_batch(self, y: Tensor, dims: Dims, seen: Dims) -> Tensor:
        """Move the batch at the front of ``y`` to where ``seen`` has it."""
        holding = [p for p, dim in enumerate(seen) if any(f in dim for f in self.batch)]
        if len(holding) == 1 and seen[holding[0]] == self.batch:
            return y.movedim(0, holding[0]).squeeze(holding[0] + 1)
        batch_sizes = [self.extent(factor.size) for factor in self.batch]
        y = torch.unflatten(y, 0, batch_sizes) if len(batch_sizes) > 1 else y
        lead = len(self.batch)
        order: list[int] = []
        merged: list[Extent] = []
        grown: list[Extent] = []
        extra = y.dim()
        for place, dim in enumerate(seen):
            if place not in holding:
                order.append(lead + place)
                grown.append(y.shape[lead + place])
                merged.append(y.shape[lead + place])
                continue
            size: Extent = 1
            for factor in dim:
                own = self.extent(factor.size)
                size = size * own
                if factor in self.batch:
                    order.append(self.batch.index(factor))
                else:
                    y = y.unsqueeze(-1)
                    order.append(extra)
                    extra += 1
                grown.append(own)
            merged.append(size)
        dropped = [lead + place for place in holding]
        kept = permuted(y, [*order, *dropped])
        for _ in dropped:
            kept = kept.squeeze(-1)
        return reshaped(kept.expand(grown), merged)


def in_memory_order(y: Tensor, like: Tensor) -> Tensor:
    """``y`` with its dimensions in memory as those of ``like``, where these are permuted.

    A sum over tokens adds in the order in which they lie in memory: in another order its last
    bits differ.
    """
    order = sorted(range(like.dim()), key=lambda place: like.stride(place), reverse=True)
    plain = order == list(range(like.dim()))
    if plain or 0 in like.stride():
        return y
    return y.permute(order).contiguous().permute([order.index(p) for p in range(y.dim())])


def _product(sizes: Sequence[Extent]) -> Extent:
    total: Extent = 1
    for size in sizes:
        total = total * size
    return total


def _is_zero(size: Extent) -> bool:
    return isinstance(size, int) and size == 0


def batch_factors(dims: Sequence[Dim], grid: Grid) -> tuple[Factor, ...]:
    """The factors of ``dims`` that come from the input and are no patch tokens: the batch."""
    return tuple(
        factor
        for dim in dims
        for unit in grid.units(dim)
        if not unit.holds_grid
        for factor in unit.dim
        if factor.axis.data
    )
