"""Blocks: attention and MLP around the residual stream.

A block begins with the addition of an attention and takes the additions of MLPs up to the next one.
Covered: pre-norm, post-norm and sandwich norms, LayerScale, attention and MLP side by side, several
attentions side by side, a block without an MLP. Not covered: an attention that is not added to a
stream it was computed from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from tokenpass.blocks import Attention, Block, Mlp, NoMatch, Residual
from tokenpass.graph import depends

PATTERN = "block"


@dataclass
class _Open:
    """A block that is being put together."""

    attentions: list[Attention] = field(default_factory=list)
    mlps: list[Mlp] = field(default_factory=list)
    residuals: list[Residual] = field(default_factory=list)


def find_blocks(
    attentions: Sequence[Attention],
    mlps: Sequence[Mlp],
    residuals: Sequence[Residual],
    sets: Mapping[fx.Node, int],
) -> list[Block | NoMatch]:
    """Put attentions and MLPs together into blocks, in execution order."""
    at: dict[fx.Node, _Open] = {}
    misses: list[NoMatch] = []
    for attention in attentions:
        residual = _addition(residuals, sets, attention.out, attention.query)
        if residual is None:
            reason = "the attention is not added to the stream it was computed from"
            misses.append(NoMatch(PATTERN, reason, (attention.out,)))
            continue
        at.setdefault(residual.out, _Open()).attentions.append(attention)
    for mlp in mlps:
        residual = _addition(residuals, sets, mlp.out, mlp.input)
        if residual is not None:
            at.setdefault(residual.out, _Open()).mlps.append(mlp)
    return [*_assemble(residuals, at), *misses]


def _addition(
    residuals: Sequence[Residual], sets: Mapping[fx.Node, int], out: fx.Node, source: fx.Node
) -> Residual | None:
    """The first addition whose branch holds what runs from ``source`` to ``out``."""
    for residual in residuals:
        if depends(sets, residual.branch, out) and depends(sets, source, residual.root):
            return residual
    return None


def _assemble(residuals: Sequence[Residual], at: Mapping[fx.Node, _Open]) -> list[Block]:
    blocks: list[_Open] = []
    root: fx.Node | None = None
    for residual in residuals:
        part = at.get(residual.out)
        if part is None:
            continue
        beside = root is residual.root
        if part.attentions and not beside:
            blocks.append(_Open())
            root = residual.root
        if not blocks:
            continue
        blocks[-1].attentions += part.attentions
        blocks[-1].mlps += part.mlps
        blocks[-1].residuals.append(residual)
    return [
        Block(tuple(block.attentions), tuple(block.mlps), tuple(block.residuals))
        for block in blocks
    ]
