"""Additions to the residual stream: ``out = skip + branch``, the branch computed from the skip.

Covered: ``add`` and ``addcmul`` in either order; a scaled skip; branches side by side on one
stream (``x + attention(x) + mlp(x)``). Not covered: sums whose parts do not depend on one another
(rotary embeddings, a position table).
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

ADDITIONS = (aten.add.Tensor, aten.add_.Tensor, aten.addcmul.default, aten.addcmul_.default)


def find_residuals(facts: Facts, tokens: Tokens, sets: Mapping[fx.Node, int]) -> Iterator[Residual]:
    """Residual additions of patch tokens, in order."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in facts.graph.nodes:
        if node.target not in ADDITIONS:
            continue
        carrying = [o for o in operands(node) if tokens.carried_in(facts.dims(o))]
        if len(carrying) != 2:
            continue
        for skip, branch in (carrying, reversed(carrying)):
            root = _root(facts, tokens, sets, skip, branch, roots)
            if root is not None:
                roots[node] = root
                yield Residual(skip, branch, node, root)
                break


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
        source = _scaled(facts, tokens, current)
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


def _along(facts: Facts, tokens: Tokens, source: fx.Node, seen: Dims) -> bool:
    """Whether a constant operand has a value of its own for each token."""
    own = facts.dims(source)
    return any(
        dim and tokens.carried_by(line) for dim, line in zip(own, lined_up(own, seen), strict=True)
    )
