"""Floating-point operations of a graph as a polynomial in its token counts.

Counted is what ``torch.utils.flop_counter.FlopCounterMode`` counts: two for each multiply-add of
products, convolutions and attention; for a rewritten graph also the scores and the search for the
most similar token. The symbol ``n0`` stands for the patch tokens of an image, ``n1``, ``n2``, ...
for those that each cut leaves.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy

from tokenpass.blocks import Attention
from tokenpass.dims import Dim, Dims, Size, size_of
from tokenpass.facts import Effect, Facts, Work
from tokenpass.grid import Grid
from tokenpass.passes.versions import Versions
from tokenpass.pruning import Pruning, Stage

Count = Callable[[int], Size]
"""Patch tokens in a version."""


def token_symbol(version: int) -> sympy.Symbol:
    return sympy.Symbol(f"n{version}", integer=True, positive=True)


def cost_before(facts: Facts, grid: Grid | None) -> Size:
    """FLOPs of the graph as it is, in ``n0``."""
    total: Size = sympy.Integer(0)
    for effect in facts.effects.values():
        total += node_cost(effect, grid, token_symbol(0), token_symbol(0))
    return sympy.expand(total)


def cost_after(facts: Facts, plan: Pruning, versions: Versions) -> Size:
    """FLOPs of the rewritten graph, in ``n0``, ``n1``, ..."""
    total: Size = sympy.Integer(0)
    for node, computed in versions.computed.items():
        inner = _symbol(plan, versions.level[node])
        for version in computed:
            rows = _symbol(plan, version)
            total += node_cost(facts.effects[node], plan.grid, rows, inner)
    return sympy.expand(total + score_cost(facts, plan, versions) + match_cost(facts, plan))


def score_cost(facts: Facts, plan: Pruning, versions: Versions) -> Size:
    """FLOPs of all column means."""
    scored = {(stage.attention.softmax, _level(stage)): stage.attention for stage in plan.stages}
    scored[plan.anchors.softmax, 0] = plan.anchors
    total: Size = sympy.Integer(0)
    for (_, level), attention in scored.items():
        if attention.plain and plan.method.ranking != "random":
            total += _score_cost(facts, plan, attention, _symbol(plan, level))
    return total


def _level(stage: Stage) -> int:
    return stage.number - 1 if stage.at is not None else 0


def _score_cost(facts: Facts, plan: Pruning, attention: Attention, count: Size) -> Size:
    dims = facts.dims(attention.query)
    if plan.method.ranking == "class":
        dims = tuple(dim for dim in dims if dim != attention.query_dim)
    keys = plan.grid.resized(attention.key_dim, count)
    return 2 * keys * sizes(dims, plan.grid, count)


def match_cost(facts: Facts, plan: Pruning) -> Size:
    """FLOPs of the search for the most similar kept token, over all cuts."""
    if not plan.method.merges:
        return sympy.Integer(0)
    total: Size = sympy.Integer(0)
    for stage in plan.stages:
        node = stage.at if stage.at is not None else plan.found.blocks[stage.block - 1].out
        before, after = (_symbol(plan, v) for v in (_level(stage), stage.number))
        others = [d for d in facts.dims(node) if not plan.grid.carried_by(d)]
        total += 2 * (before - after) * after * sizes(tuple(others), plan.grid, before)
    return total


def _symbol(plan: Pruning, version: int) -> Size:
    return sympy.Integer(0) if version == plan.prefix_only else token_symbol(version)


def node_cost(effect: Effect, grid: Grid | None, rows: Size, inner: Size) -> Size:
    return sympy.Add(*(2 * _work_cost(work, grid, rows, inner) for work in effect.work))


def _work_cost(work: Work, grid: Grid | None, rows: Size, inner: Size) -> Size:
    return work.times * sizes(work.rows, grid, rows) * sizes(work.inner, grid, inner)


def sizes(dims: Dims, grid: Grid | None, count: Size) -> Size:
    def size(dim: Dim) -> Size:
        return size_of(dim) if grid is None else grid.resized(dim, count)

    return sympy.Mul(*(size(dim) for dim in dims))


def evaluate(cost: Size, counts: dict[int, int], hint: Callable[[Size], int]) -> int:
    """A cost as a number.

    Args:
        cost: From the functions above.
        counts: Patch tokens in each version.
        hint: Values of the other symbols, for the inputs at hand.
    """
    values = {token_symbol(version): count for version, count in counts.items()}
    return hint(cost.subs(values))
