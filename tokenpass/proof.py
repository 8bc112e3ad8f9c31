"""The trail of the axis analysis in words: what the patch tokens are, and how that is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import fx

from tokenpass.blocks import Found
from tokenpass.dims import Dims, Size, is_data
from tokenpass.facts import Facts, What, lined_up
from tokenpass.graph import place, short_place, tensor_of, unique
from tokenpass.grid import Grid


def proof(facts: Facts, found: Found) -> list[str]:
    """One line for each step."""
    if found.grid is None:
        return []
    grid = found.grid
    lines = [tokens_line(grid.shape)]
    if found.embedding is not None:
        lines += _embedding_lines(facts, grid, found)
    if found.over_grid:
        lines.append(_token_line(facts, grid, found))
    lines += _table_lines(facts, grid)
    lines.append(_count_line(facts, grid))
    return lines


def tokens_line(shape: Sequence[Size], *, packed: bool = False) -> str:
    """What the patch tokens are.

    Args:
        shape: Of the grid, ``(H, W)`` or ``(T, H, W)``; ``(1, N)`` of packed ones.
        packed: Whether patches of several images lie end to end.
    """
    if packed:
        return f"patch tokens: {shape[-1]} positions of several images, which share the budget"
    return f"patch tokens: a grid of {' x '.join(map(str, shape))} positions of the input"


def _embedding_lines(facts: Facts, grid: Grid, found: Found) -> list[str]:
    embedding = found.embedding
    assert embedding is not None
    makers = ", ".join(_describe(node) for node in embedding.makers)
    (where,) = grid.carried_in(facts.dims(embedding.out))[:1]
    return [
        f"  positions made {f'by {makers}' if makers else 'outside the graph'}",
        f"  along one dimension from {_describe(embedding.out)} on: {where}",
    ]


def _token_line(facts: Facts, grid: Grid, found: Found) -> str:
    match = found.over_grid[0]
    layout = grid.layout(grid.token_unit(match.key_dim))
    parts = [f"{size} prefix" if size is not None else f"{grid.count} patch" for size in layout]
    shape = tuple(tensor_of(match.query).shape)
    where = grid.carried_in(facts.dims(match.query))[0]
    return f"one token axis: {' + '.join(parts)}; dimension {where} of queries {shape}"


def _table_lines(facts: Facts, grid: Grid) -> list[str]:
    tables = unique(
        source
        for node in facts.effects
        for source, seen in facts.seen(node)
        if _runs_along(facts, grid, source, seen)
    )
    return [f"constant along the token axis: {_describe(node)}" for node in tables]


def _runs_along(facts: Facts, grid: Grid, source: fx.Node, seen: Dims) -> bool:
    if len(facts.effects[source].outs) != 1:
        return False
    own = facts.dims(source)
    if any(is_data(dim) for dim in own) or len(seen) < len(own):
        return False
    lined = lined_up(own, seen)
    return any(dim and grid.carried_by(line) for dim, line in zip(own, lined, strict=True))


def _count_line(facts: Facts, grid: Grid) -> str:
    alone: Counter[str] = Counter()
    together: Counter[str] = Counter()
    for node, effect in facts.effects.items():
        if not any(grid.carried_in(dims) for _, dims in facts.seen(node)):
            continue
        mixing = any(grid.touched_by(axis) for axis in effect.mixed) or effect.what is What.OPAQUE
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        (together if mixing else alone)[name] += 1
    mixed = ", ".join(f"{count} {name}" for name, count in together.most_common())
    return (
        f"{alone.total()} operations treat each token alone; tokens see each other in "
        f"{mixed or 'none'}"
    )


def _describe(node: fx.Node) -> str:
    shape = ""
    value = node.meta.get("val")
    if value is not None and hasattr(value, "shape"):
        shape = f" {tuple(value.shape)}"
    where = short_place(place(node))
    return f"{node.name}{shape}" + (f" [{where}]" if where else "")
