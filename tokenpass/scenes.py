"""Telling a cut from motion, on the pixels of a frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

CELLS = 16
"""Rows and columns of cells that a picture is divided into."""

CHANGED = 0.1
"""A cell has changed if the root mean square of its difference is that share of the picture's
standard deviation: above the noise of a camera that stands still (docs/study.md)."""


class SceneWatch:
    """Remembers a frame, and compares the next one with it."""

    def __init__(self) -> None:
        self._before: list[Tensor] = []

    def cut(self, frames: Sequence[Any], share: float | None) -> bool:
        """Whether at least ``share`` of the cells of all pictures changed since the last call.

        Args:
            frames: What the model is given; pictures are floating tensors ``(..., H, W)``.
            share: ``None`` for no cut ever.
        """
        if share is None:
            return False
        pictures = [x.detach() for x in frames if _is_picture(x)]
        before, self._before = self._before, [x.clone() for x in pictures]
        if not pictures or len(before) != len(pictures):
            return False
        changed = [_changed(x, y) for x, y in zip(pictures, before, strict=True)]
        return bool(torch.cat(changed).float().mean() >= share)


def _is_picture(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 4


def _changed(x: Tensor, y: Tensor) -> Tensor:
    """Which cells of ``(..., C, H, W)`` changed: bool, one dimension."""
    moved = (x - y).float().square().mean(-3, keepdim=True).flatten(0, -4)
    cells = (min(CELLS, x.shape[-2]), min(CELLS, x.shape[-1]))
    return (adaptive_avg_pool2d(moved, cells) > (CHANGED * x.float().std()) ** 2).reshape(-1)
