"""The arithmetic of a gate (Eventful Transformers, arXiv 2308.13494, section 4.1).

A gate remembers of each token the value that it last let through, measures how far the token has
moved away from it, and lets through those that moved most, or by more than a threshold. Knows
nothing of graphs. Shapes: ``B`` images, ``N`` tokens, ``R`` rows let through, ``F`` elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Count = int
"""Tokens of each image; an integer or a ``torch.SymInt``."""

FEWEST = 2
"""Sizes from two on need no case of their own in a compiled graph."""


def change(now: Sequence[Tensor], before: Sequence[Tensor], norm: float) -> Tensor:
    """How far each token has moved: the norm of ``now - before`` over its elements (section 4.1).

    Args:
        now: What the region reads, each ``(B * N, F)``.
        before: What it last used.
        norm: 1, 2 or ``inf``.

    Returns:
        ``(B * N,)``, float32.
    """
    each = [_length((x - y).float(), norm) for x, y in zip(now, before, strict=True)]
    return each[0] if len(each) == 1 else _length(torch.stack(each, 1), norm)


def let_through(moved: Tensor, images: int, fixed: Tensor | None, count: Count) -> Tensor:
    """The ``count`` tokens of each image that moved most; those in ``fixed`` come first.

    Args:
        moved: From :func:`change`, ``(B * N,)``.
        images: ``B``.
        fixed: Which tokens always pass, ``(N,)``, bool.
        count: Tokens of each image that pass, those in ``fixed`` included.

    Returns:
        ``(B, count)``, int64, positions in the image.
    """
    return _ranked(moved, images, fixed).topk(count, dim=1).indices


def over_threshold(
    moved: Tensor, images: int, fixed: Tensor | None, threshold: Tensor, most: Count | None
) -> Tensor:
    """The tokens that moved by more than ``threshold``, and those in ``fixed``.

    Args:
        moved: From :func:`change`, ``(B * N,)``.
        images: ``B``.
        fixed: Which tokens always pass, ``(N,)``, bool.
        threshold: Scalar; strictly greater passes.
        most: At most so many of each image, those that moved most; ``None`` for no limit.

    Returns:
        ``(B, N)``, bool.
    """
    ranked = _ranked(moved, images, fixed)
    passing = ranked > threshold
    if most is None:
        return passing
    best = torch.zeros_like(passing).scatter(1, ranked.topk(most, dim=1).indices, True)
    return passing & best


def _ranked(moved: Tensor, images: int, fixed: Tensor | None) -> Tensor:
    ranked = moved.reshape(images, -1)
    return ranked if fixed is None else ranked.masked_fill(fixed, math.inf)


def positions_of(passing: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that pass, and fillers where an image has fewer of them than another.

    At least :data:`FEWEST` are returned, so that a compiled graph need not ask.

    Args:
        passing: ``(B, N)``, bool.

    Returns:
        Positions ``(B, U)``, and which of them pass, ``(B, U)``.
    """
    most = passing.sum(1).max().clamp(min=FEWEST).item()
    torch._check(most >= FEWEST)  # type: ignore[no-untyped-call]
    torch._check(most <= passing.shape[1])  # type: ignore[no-untyped-call]
    order = passing.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    positions = order[:, :most]
    return positions, passing.gather(1, positions)


def _length(x: Tensor, norm: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, norm, dim=1)
    return length
