"""Labelled photographs that lie outside of the repository; see README.md."""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.saliency import MEAN, STD

VARIABLE = "TOKENPASS_DATA"
DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "assets"


class DataMissingError(FileNotFoundError):
    """Weights or images are not where they are looked for."""


def data_file(name: str) -> Path:
    """A file of the data folder.

    Raises:
        DataMissingError: If it is not there.
    """
    folder = Path(os.environ.get(VARIABLE, DEFAULT_FOLDER))
    path = folder / name
    if not path.exists():
        raise DataMissingError(
            f"{name} is not in {folder}: put it there, or let {VARIABLE} name the folder that "
            "holds it (benchmarks/README.md says what belongs in it)"
        )
    return path


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """A photograph as ``(3, size, size)``: bicubic, normalised for ImageNet."""
    small = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def labels(limit: int | None = None) -> dict[str, int]:
    """File names and ImageNet classes (0 to 999) of the first ``limit`` photographs."""
    with data_file("images/labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:limit]
    return {row["file"]: int(row["label"]) for row in rows}


def batches(size: int, batch: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The photographs ``(B, 3, size, size)`` and their labels ``(B,)``, in the order of the list.

    Args:
        size: Side of the images.
        batch: ``B``; the last one may hold fewer.
        limit: How many photographs; default all.
    """
    wanted = list(labels(limit).items())
    with tarfile.open(data_file("images/images.tar")) as archive:
        for start in range(0, len(wanted), batch):
            part = wanted[start : start + batch]
            images = [to_tensor(_read(archive, name), size) for name, _ in part]
            yield torch.stack(images), torch.tensor([label for _, label in part])


def _read(archive: tarfile.TarFile, name: str) -> Image.Image:
    member = archive.extractfile(name)
    if member is None:
        raise DataMissingError(f"{name} is listed in labels.csv but no file in images.tar")
    return Image.open(io.BytesIO(member.read()))
