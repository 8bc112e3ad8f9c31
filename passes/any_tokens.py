"""What the patterns find around tokens of any kind: of a grid, of windows, pooled or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from tokenpass.blocks import Block, Found, Mlp, NoMatch, Residual
from tokenpass.facts import Facts
from tokenpass.gating import Region
from tokenpass.graph import ancestors
from tokenpass.grid import AnyTokens
from tokenpass.passes.functionalise import written_values
from tokenpass.passes.input_axes import channel_axes, image_axes
from tokenpass.passes.token_wise import find_regions
from tokenpass.patterns import block, mlp, residual


@dataclass(frozen=True)
class Surroundings:
    """Regions, MLPs and blocks, whatever tokens they run over.

    Attributes:
        regions: Token-wise regions with a linear layer, in execution order.
        mlps: Every MLP.
        blocks: Attentions and MLPs around residual streams.
        misses: Attentions that are in no block.
    """

    regions: Sequence[Region]
    mlps: Sequence[Mlp]
    blocks: Sequence[Block]
    misses: Sequence[NoMatch]


def around_any_tokens(
    facts: Facts,
    found: Found,
    constants: frozenset[fx.Node],
    *,
    with_norms: bool,
    cut_off: bool = False,
) -> Surroundings:
    """Find them.

    Args:
        facts: Of the graph; all sizes are numbers.
        found: What the patterns found.
        constants: Placeholders that are parameters or buffers.
        with_norms: Whether a region begins before its first linear layer.
        cut_off: Whether an MLP's attention may be in another graph, and an attention's addition.
    """
    images = image_axes(facts)
    channels = channel_axes(facts)
    tokens = AnyTokens(images | channels)
    sets = ancestors(facts.graph)
    residuals = list(residual.find_residuals(facts, tokens, sets))
    stream = frozenset(n for item in residuals for n in (item.out, item.skip, item.root))
    pinned = written_values(facts.graph)
    regions = find_regions(
        facts, images, channels, stream, pinned, constants, with_norms=with_norms
    )
    mlps = [m for m in mlp.find_mlps(facts, tokens, stream) if isinstance(m, Mlp)]

    def sum_behind(source: fx.Node) -> Residual | None:
        return residual.sum_behind(facts, tokens, sets, source)

    blocks = block.find_blocks(
        found.attentions,
        mlps,
        residuals,
        sets,
        sum_behind,
        loose=not cut_off,
        cut_off=cut_off,
    )
    return Surroundings(
        regions,
        mlps,
        [b for b in blocks if isinstance(b, Block)],
        [b for b in blocks if isinstance(b, NoMatch)],
    )
