"""What a graph asks of a machine: operations of two sorts, and bytes that it writes.

The operations add up to the cost polynomial (:mod:`tokenpass.passes.cost`), with numbers in it. The
bytes are those of every value that some arithmetic makes; views move nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import sympy
from torch import fx

from tokenpass.calibration import Load
from tokenpass.dims import Size, is_data
from tokenpass.facts import Effect, Facts, What
from tokenpass.graph import operands, values_of
from tokenpass.grid import Grid
from tokenpass.passes.cost import match_cost, node_cost, score_cost, sizes, token_symbol
from tokenpass.passes.versions import Versions
from tokenpass.pruning import Pruning

WRITES = (
    What.POINTWISE,
    What.NORM,
    What.CONTRACT,
    What.SOFTMAX,
    What.ATTENTION,
    What.MIX,
    What.REDUCE,
    What.AVERAGE,
)

Hint = Callable[[Size], int]
"""A size as the number that it has for the inputs at hand."""

Run = tuple[fx.Node, Size, Size]
"""A node, the patch tokens among its rows, and those that it sums over."""


def load_before(facts: Facts, grid: Grid | None, hint: Hint) -> Load:
    """Of the graph as it is."""
    count: Size = sympy.Integer(0) if grid is None else grid.count
    return _total(facts, grid, ((node, count, count) for node in facts.effects), hint)


def load_after(facts: Facts, plan: Pruning, versions: Versions, hint: Hint) -> Load:
    """Of the rewritten graph."""
    numbers = {v: sympy.Integer(hint(plan.count(v))) for v in range(len(plan.stages) + 1)}
    nothing = sympy.Integer(0)
    runs = (
        (node, numbers.get(version, nothing), numbers.get(versions.level[node], nothing))
        for node, computed in versions.computed.items()
        for version in computed
    )
    total = _total(facts, plan.grid, runs, hint)
    values = {token_symbol(version): number for version, number in numbers.items()}
    choosing = score_cost(facts, plan, versions) + match_cost(facts, plan)
    return Load(
        total.linear, total.attention + hint(sympy.sympify(choosing).subs(values)), total.bytes
    )


def _total(facts: Facts, grid: Grid | None, runs: Iterable[Run], hint: Hint) -> Load:
    flops: dict[bool, Size] = {True: sympy.Integer(0), False: sympy.Integer(0)}
    written: Size = sympy.Integer(0)
    for node, rows, inner in runs:
        effect = facts.effects[node]
        if effect.work:
            flops[_compares_tokens(facts, node, effect)] += node_cost(effect, grid, rows, inner)
        if effect.what in WRITES:
            for value, dims in zip(values_of(node), effect.outs, strict=False):
                written += value.element_size() * sizes(dims, grid, rows)
    return Load(hint(flops[False]), hint(flops[True]), hint(written))


def _compares_tokens(facts: Facts, node: fx.Node, effect: Effect) -> bool:
    """Whether both factors of a product are computed from the input, as in attention."""
    if effect.what is What.ATTENTION:
        return True
    data = [o for o in operands(node) if any(is_data(dim) for dim in facts.dims(o))]
    return effect.what is What.CONTRACT and len(data) > 1
