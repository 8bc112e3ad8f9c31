"""Patch embedding: where image positions become tokens.

The axis analysis has already said which axes the patch tokens run along and which node made each:
a strided convolution, a pooling, a reshape into patches. The embedding ends at the first value in
which they lie along one dimension.
"""

from __future__ import annotations

from tokenpass import reasons
from tokenpass.blocks import NoMatch, PatchEmbedding
from tokenpass.facts import Facts
from tokenpass.graph import unique
from tokenpass.grid import Grid

PATTERN = "patch embedding"


def find_embedding(facts: Facts, grid: Grid) -> PatchEmbedding | NoMatch:
    """Where the tokens of ``grid`` come from."""
    makers = tuple(unique(f.axis.node for f in grid.dim if f.axis.node is not None))
    for node in facts.graph.nodes:
        outs = facts.effects[node].outs
        if outs and grid.carried_in(outs[0]):
            return PatchEmbedding(node, makers)
    return NoMatch(PATTERN, reasons.NO_ONE_DIMENSION, makers)
