"""Blocks: attention and MLP around the residual stream.

A block begins with the addition of an attention and takes the additions of MLPs up to the next one.
Covered: pre-norm, post-norm and sandwich norms, LayerScale, attention and MLP side by side, several
attentions side by side, a block without an MLP; where it is asked for, an attention that is added
to a stream which was projected or pooled on the way, and one that is added to nothing. Not covered:
MLPs behind the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from tokenpass import reasons
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
    sum_behind: Callable[[fx.Node], Residual | None] = lambda source: None,
    *,
    loose: bool = False,
    cut_off: bool = False,
) -> list[Block | NoMatch]:
    """Put attentions and MLPs together into blocks, in execution order.

    Args:
        attentions: What blocks begin with.
        mlps: What they may go on with.
        residuals: The additions to residual streams.
        sets: From :func:`tokenpass.graph.ancestors`.
        sum_behind: Where an attention is added to what it was not computed from.
        loose: Whether an attention that is added to nothing is a block of its own.
        cut_off: Whether an MLP is one, whose attention may be in another graph.
    """
    at: dict[fx.Node, _Open] = {}
    alone: list[Block] = []
    misses: list[NoMatch] = []
    for attention in attentions:
        residual = _addition(residuals, sets, attention.out, attention.query)
        if residual is None:
            residual = sum_behind(attention.out)
            residuals = _with(residuals, residual, sets)
        if residual is None and loose:
            alone.append(Block((attention,), (), ()))
            continue
        if residual is None:
            misses.append(NoMatch(PATTERN, reasons.NOT_ADDED, (attention.out,)))
            continue
        at.setdefault(residual.out, _Open()).attentions.append(attention)
    for mlp in mlps:
        residual = _addition(residuals, sets, mlp.out, mlp.input)
        if residual is not None:
            at.setdefault(residual.out, _Open()).mlps.append(mlp)
    blocks = [*_assemble(residuals, at, cut_off=cut_off), *alone]
    return [*sorted(blocks, key=lambda block: sets[block.first].bit_length()), *misses]


def _with(
    residuals: Sequence[Residual], more: Residual | None, sets: Mapping[fx.Node, int]
) -> Sequence[Residual]:
    """``residuals`` and one more, in execution order."""
    if more is None or any(more.out is item.out for item in residuals):
        return residuals
    return sorted([*residuals, more], key=lambda item: sets[item.out].bit_length())


def _addition(
    residuals: Sequence[Residual], sets: Mapping[fx.Node, int], out: fx.Node, source: fx.Node
) -> Residual | None:
    """The first addition whose branch holds what runs from ``source`` to ``out``."""
    for residual in residuals:
        if depends(sets, residual.branch, out) and depends(sets, source, residual.root):
            return residual
    return None


def _assemble(
    residuals: Sequence[Residual], at: Mapping[fx.Node, _Open], *, cut_off: bool
) -> list[Block]:
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
        elif cut_off and not (blocks and blocks[-1].attentions):
            blocks.append(_Open())
        if not blocks:
            continue
        blocks[-1].attentions += part.attentions
        blocks[-1].mlps += part.mlps
        blocks[-1].residuals.append(residual)
    return [
        Block(tuple(block.attentions), tuple(block.mlps), tuple(block.residuals))
        for block in blocks
    ]
