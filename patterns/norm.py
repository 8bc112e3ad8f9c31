"""Normalisation over channels: the fused operators, or a reduction over channels and what follows.

Covered: ``layer_norm``, ``rms_norm``, ``group_norm`` of one group; the same written out with mean,
variance, root mean square or vector norm, with or without an affine part. Not covered: anything
that reduces over tokens or over the batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping

from torch import fx

from tokenpass.blocks import Norm
from tokenpass.dims import is_data
from tokenpass.facts import Facts, What
from tokenpass.graph import operands
from tokenpass.grid import Tokens

REDUCTIONS = (What.REDUCE, What.AVERAGE)


def find_norms(facts: Facts, tokens: Tokens) -> Iterator[Norm]:
    """Norms of patch tokens, in order; a norm that is part of another is not repeated."""
    inside: set[fx.Node] = set()
    order = {node: place for place, node in enumerate(facts.effects)}
    for node in facts.graph.nodes:
        effect = facts.effects[node]
        if node in inside or not effect.outs or not tokens.carried_in(effect.outs[0]):
            continue
        if any(tokens.touched_by(axis) or axis.data for axis in effect.mixed):
            continue
        if effect.what is What.NORM:
            yield Norm(operands(node)[0], node)
        elif effect.what in REDUCTIONS:
            region, norm = _written_out(facts, node, order)
            inside |= region
            if norm is not None:
                yield norm


def _written_out(
    facts: Facts, reduction: fx.Node, order: Mapping[fx.Node, int]
) -> tuple[set[fx.Node], Norm | None]:
    """The elementwise region that a reduction over channels opens and its input closes."""
    source, region, last = operands(reduction)[0], {reduction}, [reduction]
    while facts.effects[source].what is What.POINTWISE and len(operands(source)) == 1:
        region.add(source)
        source = operands(source)[0]

    def joins(node: fx.Node) -> bool:
        what = facts.effects[node].what
        if what not in (What.POINTWISE, What.VIEW, *REDUCTIONS):
            return False
        reads = [o for o in operands(node) if any(is_data(dim) for dim in facts.dims(o))]
        if not all(o in region or o is source for o in reads):
            return False
        region.add(node)
        if what is What.POINTWISE:
            last.append(node)
        return True

    _users_in_order(reduction, order, joins)
    complete = facts.dims(last[-1]) == facts.dims(source)
    return region, Norm(source, last[-1]) if complete and len(last) > 1 else None


def _users_in_order(
    start: fx.Node, order: Mapping[fx.Node, int], joins: Callable[[fx.Node], bool]
) -> None:
    """Visit the users of ``start``, and of every visited node that joins, in execution order."""
    queue = [(order[user], user.name, user) for user in start.users]
    heapq.heapify(queue)
    seen: set[fx.Node] = set()
    while queue:
        _, _, node = heapq.heappop(queue)
        if node in seen:
            continue
        seen.add(node)
        if joins(node):
            for user in node.users:
                heapq.heappush(queue, (order[user], user.name, user))
