"""HiPrune's rule for one image, in plain Python: slow, and easy to check by reading.

A grid is ``(H, W)`` or ``(T, H, W)``; positions count along its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

BUFFERS_AND_ANCHOR = 5


def ranked(scores: Sequence[float]) -> list[int]:
    """Positions from best to worst; of equal scores the lower position comes first."""
    return sorted(range(len(scores)), key=lambda position: (-scores[position], position))


def anchor_positions(scores: Sequence[float], budget: int, alpha: float) -> list[int]:
    """The tokens that most attention goes to, one for every five places of their share."""
    return ranked(scores)[: round(budget * alpha / BUFFERS_AND_ANCHOR)]


def neighbours(position: int, grid: Sequence[int]) -> set[int]:
    """Tokens beside, above and below a token, in its own frame."""
    height, width = grid[-2:]
    frame, place = divmod(position, height * width)
    row, column = divmod(place, width)
    beside = {(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)}
    return {
        frame * height * width + r * width + c
        for r, c in beside
        if 0 <= r < height and 0 <= c < width
    }


def safe_positions(
    scores: Sequence[float], grid: Sequence[int], budget: int, alpha: float
) -> set[int]:
    """Anchors and buffers; where they exceed the budget, the best of them."""
    found = anchor_positions(scores, budget, alpha)
    found = sorted({*found, *(near for anchor in found for near in neighbours(anchor, grid))})
    return set([position for position in ranked(scores) if position in found][:budget])


def survivors(safe: Iterable[int], scores: Sequence[float], count: int) -> list[int]:
    """The ``count`` best positions, safe ones before all others, ascending."""
    first = set(safe)
    order = ranked(scores)
    chosen = [p for p in order if p in first] + [p for p in order if p not in first]
    return sorted(chosen[:count])


def select(
    object_scores: Sequence[float],
    deep_scores: Sequence[float],
    grid: Sequence[int],
    budget: int,
    alpha: float,
) -> list[int]:
    """The whole rule: anchors, buffers and registers, ascending."""
    assert math.prod(grid) == len(object_scores) == len(deep_scores)
    return survivors(safe_positions(object_scores, grid, budget, alpha), deep_scores, budget)
