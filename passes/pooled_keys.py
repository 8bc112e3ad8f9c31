"""Which key each token is pooled into, where keys and values stand for cells of the grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from tokenpass.blocks import Attention
from tokenpass.dims import Axis, Dim, is_data
from tokenpass.facts import Facts
from tokenpass.gating import Region
from tokenpass.graph import arguments, operands
from tokenpass.rows import RowLayout

Cells = tuple[int, ...]


def pooled_cells(facts: Facts, match: Attention, region: Region) -> Cells | None:
    """For each token of ``region`` the key, and the value, that it is a part of.

    ``None`` if there is not exactly one: cells overlap, or leave a token out, or more happens to
    the tokens on the way than one pooling and what treats every cell alone.
    """
    value_dim = facts.dims(match.value)[-2]
    keys = _cells(facts, match.key, match.key_dim, region)
    values = _cells(facts, match.value, value_dim, region)
    return keys if keys is not None and keys == values else None


def _cells(facts: Facts, node: fx.Node, tokens: Dim, region: Region) -> Cells | None:
    axes = {factor.axis for factor in tokens}
    pooling = {axis.node for axis in axes - region.layout.axes}
    if len(pooling) != 1:
        return None
    (pool,) = pooling
    if pool is None or not _treats_alone(facts, node, pool, axes):
        return None
    source, steps = operands(pool)[0], _steps(pool)
    if steps is None or source not in region.outputs:
        return None
    grid, after = facts.dims(source)[-len(steps) :], facts.dims(pool)[-len(steps) :]
    places = [after.index((factor,)) for factor in tokens if (factor,) in after]
    layout = RowLayout((), region.layout.tokens)
    if sorted(places) != list(range(len(steps))) or not layout.carried_by(grid):
        return None
    numbers = layout.full(torch.arange(layout.count)[:, None], grid)
    if any(size % step for size, step in zip(numbers.shape, steps, strict=True)):
        return None
    cells = _numbered(numbers.shape, steps, places)
    return tuple(cells.flatten()[numbers.flatten().argsort()].tolist())


def _numbered(shape: Sequence[int], steps: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    """The number of each position's cell; cells are counted with ``order[-1]`` running fastest."""
    total, cells = torch.zeros((), dtype=torch.int64), 1
    for place in reversed(order):
        along = torch.arange(shape[place]) // steps[place]
        total = total + cells * along.reshape([-1 if p == place else 1 for p in range(len(shape))])
        cells *= shape[place] // steps[place]
    return total


def _steps(pool: fx.Node) -> Sequence[int] | None:
    """The sides of a pooling's or convolution's cells; ``None`` if they overlap or are padded."""
    given = arguments(pool)
    sides = given.get("kernel_size")
    if sides is None and "weight" in given:
        sides = list(given["weight"].meta["val"].shape[2:])
    if sides is None:
        return None
    whole = {name: given.get(name, plain) for name, plain in (("padding", 0), ("dilation", 1))}
    padded = any(step != 0 for step in _listed(whole["padding"]))
    dilated = any(step != 1 for step in _listed(whole["dilation"]))
    return None if padded or dilated or list(given["stride"] or sides) != list(sides) else sides


def _listed(value: int | str | Sequence[int]) -> Sequence[int | str]:
    return [value] if isinstance(value, (int, str)) else value


def _treats_alone(facts: Facts, node: fx.Node, pool: fx.Node, axes: set[Axis]) -> bool:
    """Whether ``node`` is ``pool``, but for operations that treat every cell alone."""
    return all(
        len(sources) == 1 and axes.isdisjoint(facts.effects[step].mixed)
        for step, sources in _way(facts, node, pool)
    )


def _way(facts: Facts, node: fx.Node, pool: fx.Node) -> Iterator[tuple[fx.Node, Sequence[fx.Node]]]:
    """The nodes from ``node`` back to ``pool``, each with what it reads of the input."""
    while node is not pool:
        sources = [o for o in operands(node) if any(is_data(dim) for dim in facts.dims(o))]
        yield node, sources
        if not sources:
            return
        node = sources[0]
