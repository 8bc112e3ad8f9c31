"""Clips of video that lie outside of the repository (see README.md), frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data import DataMissingError, data_file
from examples.saliency import MEAN, STD
from tokenpass.cli import clips as package
from tokenpass.cli.clips import frame_rate
from tokenpass.cli.pictures import Pixels

__all__ = ["Pixels", "clips", "frame_rate", "frames", "normalised", "pictures", "successive"]

FOLDER = "video"
HEIGHT, WIDTH = 252, 448
"""18 rows and 32 columns of patches of 14 pixels."""


def clips() -> dict[str, Path]:
    """The clips of the data folder by name.

    Raises:
        DataMissingError: If there is none.
    """
    folder = data_file(FOLDER)
    found = {path.stem: path for path in sorted(folder.glob("*.mp4"))}
    if not found:
        raise DataMissingError(f"no *.mp4 in {folder}")
    return found


def pictures(
    path: Path, limit: int | None = None, start: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Iterator[Pixels]:
    """Successive frames ``(H, W, 3)``, 0 to 255, resized without regard to their proportions.

    Args:
        path: Of a file that FFmpeg can read.
        limit: How many frames; default all.
        start: The first one.
        size: ``(H, W)``.
    """
    yield from package.pictures(path, limit, start, size)


def normalised(picture: Pixels) -> Tensor:
    """A frame ``(H, W, 3)``, 0 to 255, as models take it: ``(1, 3, H, W)``."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((pixels - mean) / std)[None].contiguous()


def frames(path: Path, limit: int | None = None, start: int = 0) -> Iterator[Tensor]:
    """Successive frames ``(1, 3, 252, 448)``, normalised for ImageNet."""
    for picture in pictures(path, limit, start):
        yield normalised(picture)


def successive(function: Callable[[Tensor], Any], video: Sequence[Tensor]) -> Callable[[], Any]:
    """Each call takes the next frame; at the end the clip runs backwards, so it is never cut."""
    endless = cycle([*video, *video[-2:0:-1]])
    return lambda: function(next(endless))
