"""The published selection of one image in plain Python, with its quirks or with them corrected."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.references.rule import anchor_positions, neighbours, ranked


def published(
    object_scores: Sequence[float],
    deep_scores: Sequence[float],
    grid: Sequence[int],
    budget: int,
    alpha: float,
    *,
    corrected: bool,
) -> list[int]:
    """Kept positions, ascending.

    Quirks: neighbours wrap round the sides and are clamped to the first and the last token at top
    and bottom; anchors and buffers may exceed the budget; they are penalised by one in the deep
    layer, not excluded, so that they may be chosen twice.

    Raises:
        ValueError: Where the published code asks for fewer than none or more than all registers.
    """
    tokens = len(object_scores)
    anchors = anchor_positions(object_scores, budget, alpha)
    local = set(anchors)
    for anchor in anchors:
        local |= neighbours(anchor, grid) if corrected else _clamped(anchor, grid[-1], tokens)
    if corrected:
        local = set([position for position in ranked(object_scores) if position in local][:budget])
    registers = budget - len(local)
    if not 0 <= registers <= tokens:
        raise ValueError(f"{registers} registers of {tokens} tokens")
    penalty = math.inf if corrected else 1.0
    penalised = [
        score - penalty if position in local else score
        for position, score in enumerate(deep_scores)
    ]
    return sorted({*local, *ranked(penalised)[:registers]})


def _clamped(anchor: int, width: int, tokens: int) -> set[int]:
    flat = (anchor - 1, anchor + 1, anchor - width, anchor + width)
    return {min(max(position, 0), tokens - 1) for position in flat}
