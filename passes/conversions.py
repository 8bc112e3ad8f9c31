"""From the tokens that a value has to those that are wanted: fewer, merged, or all again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tokenpass.dims import Dim, Dims, is_data, same, size_of
from tokenpass.facts import Facts
from tokenpass.layout import Layout
from tokenpass.merging import merge
from tokenpass.passes.stages import Stages, relative_positions
from tokenpass.pruning import Pruning
from tokenpass.views import Extent, permuted


def arranged(x: Tensor, own: Dims, wanted: Dims) -> Tensor | None:
    """``x`` with the dimensions of another value of the same images and tokens.

    Dimensions may change places, and those of size one may come and go.

    Args:
        x: A value.
        own: Its dimensions.
        wanted: Those that it is to have.

    Returns:
        ``None`` if images or tokens are others.
    """
    left = [place for place, dim in enumerate(own) if dim]
    order: list[int] = []
    for dim in filter(None, wanted):
        place = next((p for p in left if p not in order and _alike(own[p], dim)), None)
        if place is None:
            return None
        order.append(place)
    if len(order) != len(left):
        return None
    ones = [place for place, dim in enumerate(own) if not dim]
    x = permuted(x, [*order, *ones])
    for _ in ones:
        x = x.squeeze(-1)
    for place, dim in enumerate(wanted):
        if not dim:
            x = x.unsqueeze(place)
    return x


def _alike(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are of the same data, or both of none and of one size."""
    if is_data(a) or is_data(b):
        return a == b
    return same(size_of(a), size_of(b))


class Conversions:
    """Makes one version of a value from another."""

    def __init__(self, facts: Facts, plan: Pruning, layout: Layout, stages: Stages) -> None:
        self._facts = facts
        self._plan = plan
        self._grid = plan.grid
        self._layout = layout
        self._stages = stages

    def take(self, x: Tensor, dims: Dims, have: int, wanted: int) -> Tensor:
        """The tokens of a later version."""
        positions = relative_positions(self._stages, have, wanted)
        return self._take(x, dims, positions, have)

    def cut(self, x: Tensor, dims: Dims, version: int) -> Tensor:
        """The stream after the cut that makes ``version``; ``x`` has the tokens before it."""
        after = self._stages[version]
        mergeable = len(self._grid.carried_in(dims)) == 1
        if not mergeable or after.owner is None or after.owner.shape[1] == after.count:
            return self._take(x, dims, after.kept, version - 1)
        (place,) = self._grid.carried_in(dims)
        unit = self._grid.token_unit(dims[place])
        owner = self._layout.positions(unit, after.owner, after.count)
        before = self._stages[version - 1].sizes if version > 1 else None
        sizes = self._sizes(unit, before, self._tokens(version - 1), owner)
        total = self._sizes(unit, after.sizes, after.count, owner)
        rows = merge(self._layout.rows(x, dims), sizes, owner, total)
        return self._layout.from_rows(rows, x, dims)

    def restore(self, x: Tensor, dims: Dims, have: int, last: Tensor | None) -> Tensor:
        """All tokens again.

        Args:
            x: The value in version ``have``.
            dims: Of the original value.
            have: A version with fewer tokens.
            last: What discarded tokens are restored to; zeros if ``None``. Merged ones take the
                value of the token that they went into.
        """
        survivors = self._stages[have]
        if survivors.owner_of_all is not None:
            return self._take(x, dims, survivors.owner_of_all, have)

        def index(unit: Dim) -> Tensor:
            total = self._layout.extent(self._grid.resized(unit, self._grid.count))
            positions = self._layout.positions(unit, survivors.positions, self._tokens(0))
            images, taken = positions.shape
            own = torch.arange(total, device=positions.device).expand(images, -1)
            new = torch.arange(taken, device=positions.device).expand(images, -1) + total
            return own.scatter(1, positions, new)

        return self._layout.overlay(last, x, dims, index)

    def table_rows(self, dim: Dim, version: int) -> Tensor:
        """Which rows of a table over all tokens a version needs, ``(B, rows)``."""
        first = self._stages[1].positions
        if version == self._plan.prefix_only:
            positions = first[:, :0]
        elif version == 0:
            everything = torch.arange(self._tokens(0), device=first.device)
            positions = everything.expand(first.shape[0], -1)
        else:
            positions = self._stages[version].positions
        return self._layout.positions(dim, positions, self._tokens(0))

    def literals(self, node: fx.Node, version: int) -> dict[str, Any]:
        """Integer arguments of ``node`` that count tokens, for a version."""
        count = self._plan.count(version)
        changes: dict[str, Any] = {}
        for literal in self._facts.effects[node].literals:
            if not any(self._grid.carried_by(dim) for dim in literal.dims):
                continue
            sizes = [self._layout.extent(self._grid.resized(dim, count)) for dim in literal.dims]
            changes[literal.argument] = literal.value(sizes, self._layout.extent(literal.offset))
        return changes

    def _tokens(self, version: int) -> Extent:
        return self._layout.extent(self._plan.count(version))

    def _take(self, x: Tensor, dims: Dims, positions: Tensor, have: int) -> Tensor:
        before = self._tokens(have)
        return self._layout.take(
            x, dims, lambda dim: self._layout.positions(dim, positions, before)
        )

    def _sizes(self, unit: Dim, sizes: Tensor | None, count: Extent, like: Tensor) -> Tensor:
        """Sizes of all tokens along a unit, those that are no patch token being of size one."""
        pieces: list[Tensor] = []
        for size in self._grid.layout(unit):
            if size is None and sizes is not None:
                pieces.append(sizes)
                continue
            length = count if size is None else self._layout.extent(size)
            pieces.append(like.new_ones((like.shape[0], length), dtype=torch.float32))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
