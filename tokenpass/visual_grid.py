"""Where visual tokens lie in their image: needed for neighbours, and for nothing else.

Three sources, the first that fits: the picture's size in pixels and the size of a patch, which
place the encoder tokens that a visual token is made of; a table of ``(T, H, W)`` or ``(H, W)`` for
each image among the encoder's inputs; a square. An image that none of them fits has no grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpass.visual_cells import Cells


@dataclass(frozen=True)
class Raster:
    """The places of visual tokens in one image.

    Attributes:
        shape: ``(T, H, W)``: frames or crops, rows, columns.
        places: Flat index in ``shape`` of each visual token, ``(M,)``, int64; all different.
    """

    shape: tuple[int, int, int]
    places: Tensor

    def only(self, tokens: Tensor) -> Raster:
        """The grid of some tokens, without the frames or crops that hold none of them."""
        _, height, width = self.shape
        area = height * width
        kept, piece = torch.unique(self.places[tokens] // area, return_inverse=True)
        return Raster((len(kept), height, width), piece * area + self.places[tokens] % area)


@dataclass(frozen=True)
class Sizes:
    """What the encoder's inputs say about sizes.

    Attributes:
        pictures: ``(H, W)`` in pixels of each image tensor of at least four dimensions.
        tables: Integer tensors ``(images, 2 or 3)``.
        patch: Pixels of a patch ``(H, W)``, or ``None``.
    """

    pictures: tuple[tuple[int, int], ...]
    tables: tuple[Tensor, ...]
    patch: tuple[int, int] | None


def rasters(cells: Cells, images: Sequence[Tensor], sizes: Sizes) -> list[Raster | None]:
    """The grid of each image.

    Args:
        cells: What visual tokens are made of.
        images: For each image the visual tokens, ``(M,)``, that are made of encoder tokens.
        sizes: From the inputs.
    """
    fitting = (_coordinates(cells, size, sizes) for size in sizes.pictures)
    placed = next((places for places in fitting if places is not None), None)
    return [
        (
            _from_pixels(cells, image, placed)
            or _from_tables(cells, image, number, len(images), sizes)
            or _square(cells, image)
        )
        if len(image)
        else None
        for number, image in enumerate(images)
    ]


def _sequences(cells: Cells) -> tuple[Tensor, Tensor]:
    """Sequence and position within it of every flat encoder token, each ``(tokens,)``."""
    lengths = [tokens for rows, tokens in cells.layout for _ in range(rows)]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    device = cells.tokens.device
    return sequence.to(device), position.to(device)


def _coordinates(cells: Cells, size: tuple[int, int], sizes: Sizes) -> Tensor | None:
    """``(sequence, row, column)`` of the token in each pair, ``(pairs, 3)``, if all fit a picture.

    Tokens before the patches are prefix tokens: none of them may be part of a visual token.
    """
    if sizes.patch is None:
        return None
    height, width = size[0] // sizes.patch[0], size[1] // sizes.patch[1]
    lengths = {tokens for _, tokens in cells.layout}
    if len(lengths) != 1 or not height * width:
        return None
    prefix = lengths.pop() - height * width
    sequence, position = _sequences(cells)
    patch = position[cells.tokens] - prefix
    if prefix < 0 or (patch < 0).any():
        return None
    return torch.stack((sequence[cells.tokens], patch // width, patch % width), 1)


def _from_pixels(cells: Cells, image: Tensor, placed: Tensor | None) -> Raster | None:
    if placed is None:
        return None
    number = torch.full((cells.count,), -1, device=image.device)
    number[image] = torch.arange(len(image), device=image.device)
    mine = number[cells.cells] >= 0
    index, where = number[cells.cells[mine]], placed[mine]
    wide = index[:, None].expand_as(where)
    low = torch.full((len(image), 3), torch.iinfo(torch.int64).max, device=image.device)
    low = low.scatter_reduce(0, wide, where, "amin")
    high = torch.zeros_like(low).scatter_reduce(0, wide, where, "amax")
    extent = (high - low).amax(0) + 1
    if extent[0] != 1:
        return None
    piece = torch.unique(low[:, 0], return_inverse=True)[1]
    row, column = low[:, 1] // extent[1], low[:, 2] // extent[2]
    shape = tuple(int(x.max()) + 1 for x in (piece, row, column))
    places = (piece * shape[1] + row) * shape[2] + column
    if len(torch.unique(places)) != len(places):
        return None
    return Raster((shape[0], shape[1], shape[2]), places)


def _from_tables(
    cells: Cells, image: Tensor, number: int, images: int, sizes: Sizes
) -> Raster | None:
    tokens = int(cells.sizes[image].sum())
    for table in sizes.tables:
        if len(table) != images:
            continue
        row = [int(x) for x in table[number]]
        if len(row) == 2:
            if sizes.patch is None:
                continue
            row = [1, row[0] // sizes.patch[0], row[1] // sizes.patch[1]]
        side = math.isqrt(tokens // len(image))
        height, width = row[1] // side, row[2] // side
        if math.prod(row) == tokens and row[0] * height * width == len(image):
            return Raster((row[0], height, width), torch.arange(len(image), device=image.device))
    return None


def _square(cells: Cells, image: Tensor) -> Raster | None:
    sequence, _ = _sequences(cells)
    chosen = torch.zeros(cells.count, dtype=torch.bool, device=image.device)
    chosen[image] = True
    pieces = len(torch.unique(sequence[cells.tokens[chosen[cells.cells]]]))
    for count in dict.fromkeys((pieces, 1)):
        side = math.isqrt(len(image) // count)
        if side * side * count == len(image):
            places = torch.arange(len(image), device=image.device)
            return Raster((count, side, side), places)
    return None
