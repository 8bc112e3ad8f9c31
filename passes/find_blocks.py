"""Run the patterns over a labelled graph.

First the attentions: they show which axis holds tokens. The largest group of attentions over one
grid of image positions decides what the patch tokens of this graph are; attention over windows,
over pooled tokens, over another grid or over channels is reported with the reason and left alone.
"""

from __future__ import annotations

from collections import defaultdict

from tokenpass import reasons
from tokenpass.blocks import Attention, Block, Found, Mlp, NoMatch, PatchEmbedding
from tokenpass.dims import Dim
from tokenpass.facts import Facts
from tokenpass.graph import ancestors
from tokenpass.grid import Grid, image_part
from tokenpass.patterns import attention, block, embedding, mlp, norm, residual


def find_blocks(facts: Facts) -> Found:
    """Everything that the patterns recognise in the graph of ``facts``."""
    matches = list(attention.find_attentions(facts))
    attentions = [match for match in matches if isinstance(match, Attention)]
    misses = [match for match in matches if isinstance(match, NoMatch)]
    groups: dict[Dim, list[Attention]] = defaultdict(list)
    for match in attentions:
        tokens = tokens_of(facts, match)
        if isinstance(tokens, NoMatch):
            misses.append(tokens)
        else:
            groups[tokens].append(match)
    if not groups:
        return Found(None, attentions, (), (), (), (), (), None, misses)
    chosen = max(groups, key=lambda dim: len(groups[dim]))
    for dim, others in groups.items():
        if dim != chosen:
            other = reasons.OTHER_GRID
            misses += [NoMatch(attention.PATTERN, other, (match.out,)) for match in others]
    return _around(facts, Grid(chosen), attentions, groups[chosen], misses)


def _around(
    facts: Facts,
    grid: Grid,
    attentions: list[Attention],
    over_grid: list[Attention],
    misses: list[NoMatch],
) -> Found:
    """The patterns around the attentions over ``grid``."""
    sets = ancestors(facts.graph)
    residuals = list(residual.find_residuals(facts, grid, sets))
    stream = frozenset(item.out for item in residuals)
    found_mlps = list(mlp.find_mlps(facts, grid, stream))
    mlps = [match for match in found_mlps if isinstance(match, Mlp)]
    found_blocks = block.find_blocks(over_grid, mlps, residuals, sets)
    found_embedding = embedding.find_embedding(facts, grid)
    misses += [
        match
        for match in (*found_mlps, *found_blocks, found_embedding)
        if isinstance(match, NoMatch)
    ]
    return Found(
        grid=grid,
        attentions=attentions,
        over_grid=over_grid,
        mlps=mlps,
        norms=list(norm.find_norms(facts, grid)),
        residuals=residuals,
        blocks=[match for match in found_blocks if isinstance(match, Block)],
        embedding=found_embedding if isinstance(found_embedding, PatchEmbedding) else None,
        misses=misses,
    )


def tokens_of(facts: Facts, match: Attention) -> Dim | NoMatch:
    """The patch tokens that attend to one another, or why this is no such attention."""
    keys = image_part(match.key_dim)
    if isinstance(keys, str):
        return NoMatch(attention.PATTERN, keys, (match.softmax, match.key))
    queries = image_part(match.query_dim)
    if isinstance(queries, str):
        return NoMatch(attention.PATTERN, reasons.POOLING, (match.softmax, match.query))
    if queries != keys:
        nodes = (match.softmax, match.query, match.key)
        return NoMatch(attention.PATTERN, reasons.OTHER_KEYS, nodes)
    axes = {factor.axis for factor in keys}
    elsewhere = {
        factor.axis for dim in facts.dims(match.query) if dim != match.query_dim for factor in dim
    }
    if axes & elsewhere:
        return NoMatch(attention.PATTERN, reasons.WINDOWED, (match.softmax, match.query))
    return keys
