"""Tokens that keep their places from frame to frame, where a video is pruned and gated.

A gate compares what lies in a place with what it last used there. So a token that stays among those
that are left stays in its place, and one that is new takes the place of one that left.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("tokenpass::hold", mutates_args=())
def hold(kept: Tensor, positions: Tensor, tokens: int) -> Tensor:
    """``kept`` as it is; where frames are told apart, in places that tokens keep.

    Args:
        kept: Positions of the tokens that stay among those before the cut, ``(B, K)``.
        positions: Their positions on the grid, ``(B, K)``.
        tokens: Positions of the grid.
    """
    return kept.clone()


@hold.register_fake
def _(kept: Tensor, positions: Tensor, tokens: int) -> Tensor:
    return torch.empty_like(kept)


def in_places(positions: Tensor, before: Tensor, tokens: int) -> Tensor:
    """An order of ``positions`` in which those that were in ``before`` keep their places.

    Args:
        positions: Grid positions of the tokens that are left, ``(B, K)``, no two equal.
        before: Those of the last frame, in their places, ``(B, K)``.
        tokens: Positions of the grid.

    Returns:
        ``(B, K)``: for each place, which of ``positions`` takes it.
    """
    images, count = positions.shape
    numbers = torch.arange(count, device=positions.device).expand(images, -1)
    nowhere = torch.full((images, tokens), -1, dtype=torch.int64, device=positions.device)
    staying = nowhere.scatter(1, positions, numbers).gather(1, before)
    gone = staying < 0
    # Those that are new, in their order, for the places that are free, in theirs.
    was_there = nowhere.scatter(1, before, numbers).gather(1, positions) >= 0
    new = was_there.to(torch.uint8).argsort(dim=1, stable=True)
    rank = (gone.to(torch.int64).cumsum(1) - 1).clamp_min(0)
    return torch.where(gone, new.gather(1, rank), staying)
