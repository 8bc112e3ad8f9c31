"""Photographs as models take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from tokenpass.cli.models import Loaded
from tokenpass.cli.screen import InputError
from tokenpass.errors import described
from tokenpass.report import Report

Picture = NDArray[np.float32]
"""Colours ``(H, W, 3)``, 0 to 1."""
Pixels = NDArray[np.uint8]
"""The same, 0 to 255."""

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def pictures_in(paths: Sequence[Path]) -> list[Path]:
    """The files that were named, and the pictures in the folders that were, sorted.

    Raises:
        InputError: If one does not exist, or a folder holds no picture.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in ENDINGS]
            if not inside:
                raise InputError(f"{path} holds no pictures ({', '.join(ENDINGS)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"there is no file {path}")
    return found


def read(path: Path, height: int, width: int) -> Picture:
    """A photograph, its middle cut out and resized: ``(height, width, 3)``, 0 to 1.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    except Exception as error:
        raise InputError(f"{path} is no picture ({described(error)})") from error
    return np.asarray(fitted, dtype=np.float32) / np.float32(255)


def to_pixels(values: NDArray[np.floating]) -> Pixels:
    """A picture ``(H, W, 3)``, 0 to 1, as a frame, 0 to 255."""
    pixels: Pixels = (255 * values).round().clip(0, 255).astype(np.uint8)
    return pixels


def as_input(picture: Picture, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A photograph ``(H, W, 3)``, 0 to 1, as models take it: ``(1, 3, H, W)``."""
    pixels = (picture - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def input_of(loaded: Loaded, picture: Picture) -> Tensor:
    """A photograph as a model takes it, in the type of its own inputs."""
    own = loaded.images
    return as_input(picture, loaded.mean, loaded.std).to(own.device, own.dtype)


def size_of(loaded: Loaded) -> tuple[int, int]:
    """Height and width of a model's pictures.

    Raises:
        InputError: If it takes no pictures in colour.
    """
    channels, height, width = loaded.images.shape[1:]
    if channels != 3:
        raise InputError(f"{loaded.name} takes pictures of {channels} channels: expected 3")
    return height, width


def grid_of(report: Report, name: str) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        InputError: If nothing is pruned, or the tokens form no grid in two dimensions.
    """
    if not report.converted:
        reasons = "; ".join(dict.fromkeys(item.reason for item in report.refusals))
        raise InputError(f"{name} is left as it is: {reasons}")
    if len(report.grid) != 2:
        raise InputError(f"{name}: its tokens form no grid in two dimensions")
    rows, columns = report.grid
    return rows, columns
