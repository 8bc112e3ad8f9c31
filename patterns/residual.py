"""Additions to the residual stream: ``out = skip + branch``, the branch computed from the skip.

Covered: ``add`` and ``addcmul`` in either order; ``lerp`` between skip and branch; a scaled skip,
and one that is a piece of what the branch is computed from (one of several streams); branches side
by side on one stream (``x + attention(x) + mlp(x)``). Not covered: sums whose parts do not depend
on one another (rotary embeddings, a position table).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from tokenpass.blocks import Residual
from tokenpass.dims import Dims
from tokenpass.facts import Facts, What, lined_up
from tokenpass.graph import depends, operands
from tokenpass.grid import Tokens

aten = torch.ops.aten

SUMS = (aten.add.Tensor, aten.add_.Tensor, aten.addcmul.default, aten.addcmul_.default)
"""A branch of zeros leaves the skip as it is."""

ADDITIONS = (*SUMS, aten.lerp.Scalar, aten.lerp.Tensor)


def find_residuals(facts: Facts, tokens: Tokens, sets: Mapping[fx.Node, int]) -> Iterator[Residual]:
    """Residual additions of patch tokens, in order."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in facts.graph.nodes:
        if node.target not in ADDITIONS:
            continue
        carrying = _carrying(facts, tokens, node)
        if len(carrying) != 2:
            continue
        for skip, branch in (carrying, reversed(carrying)):
            root = _root(facts, tokens, sets, skip, branch, roots)
            if root is not None:
                roots[node] = root
                yield Residual(skip, branch, node, root)
                break


def sum_behind(
    facts: Facts, tokens: Tokens, sets: Mapping[fx.Node, int], source: fx.Node
) -> Residual | None:
    """The first addition of something computed from ``source`` to something that is not.

    For a stream that was projected or pooled on the way, so that it is no part of what the branch
    is computed from.
    """
    for node in facts.graph.nodes:
        if node.target not in ADDITIONS or not depends(sets, node, source):
            continue
        carrying = _carrying(facts, tokens, node)
        branches = [operand for operand in carrying if depends(sets, operand, source)]
        if len(carrying) == 2 and len(branches) == 1:
            (branch,) = branches
            skip = carrying[1] if branch is carrying[0] else carrying[0]
            return Residual(skip, branch, node, skip)
    return None


def _carrying(facts: Facts, tokens: Tokens, node: fx.Node) -> list[fx.Node]:
    return [o for o in operands(node) if tokens.carried_in(facts.dims(o))]


def _root(
    facts: Facts,
    tokens: Tokens,
    sets: Mapping[fx.Node, int],
    skip: fx.Node,
    branch: fx.Node,
    roots: Mapping[fx.Node, fx.Node],
) -> fx.Node | None:
    """What ``branch`` is computed from, if ``skip`` is that or stems from it."""
    current = skip
    while not depends(sets, branch, current):
        if current in roots and depends(sets, branch, roots[current]):
            return roots[current]
        source = _scaled(facts, tokens, current) or _whole(facts, tokens, current)
        if source is None:
            return None
        current = source
    return current


def _scaled(facts: Facts, tokens: Tokens, node: fx.Node) -> fx.Node | None:
    """What ``node`` is an elementwise function of, the same one for every token."""
    if facts.effects[node].what is not What.POINTWISE:
        return None
    seen = list(facts.seen(node))
    carrying = [source for source, _ in seen if tokens.carried_in(facts.dims(source))]
    tables = [s for s, dims in seen if s not in carrying and _along(facts, tokens, s, dims)]
    return carrying[0] if len(carrying) == 1 and not tables else None


def _whole(facts: Facts, tokens: Tokens, node: fx.Node) -> fx.Node | None:
    """What ``node`` is a piece of, or a rearrangement; of several values the one with tokens."""
    if facts.effects[node].what is not What.VIEW:
        return None
    carrying = _carrying(facts, tokens, node)
    return carrying[0] if len(carrying) == 1 else None


def _along(facts: Facts, tokens: Tokens, source: fx.Node, seen: Dims) -> bool:
    """Whether a constant operand has a value of its own for each token."""
    own = facts.dims(source)
    return any(
        dim and tokens.carried_by(line) for dim, line in zip(own, lined_up(own, seen), strict=True)
    )
