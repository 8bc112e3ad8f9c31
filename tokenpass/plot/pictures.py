"""Tokens drawn on the picture that they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from tokenpass.errors import OptionError
from tokenpass.plot.style import ORANGE, TEXT, WIDTH, figure

Picture = NDArray[np.float32]
Grid = tuple[int, int]

DIMMED = 0.4
"""How bright a patch is, and without colour, whose token left."""
TINT = (1.0, 0.59, 0.12)
STRENGTH = 0.3
"""How much of the tint a patch takes on whose token passed every gate."""
FLAT = 0.75
"""How much of a merged patch is the colour of its group; the rest is the picture."""
COLUMNS = 3
"""Panels side by side, at most."""
TITLE = 0.3
"""Inches above a panel."""


def tokens(
    image: Any,
    kept: Tensor | Sequence[Tensor],
    grid: Grid,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Which patch tokens stayed: the others are dim and grey.

    Args:
        image: ``(H, W, 3)`` or ``(3, H, W)``: an array, a tensor or a PIL picture; floats from 0 to
            1, or integers to 255.
        kept: Grid positions ``(K,)``; several of them make a panel each.
        grid: Rows and columns of patches.
        titles: Of the panels; default: how many tokens there are.

    Raises:
        OptionError: If the image is none, or a position is not on the grid.
    """
    picture = as_picture(image)
    each = [kept] if isinstance(kept, Tensor) else list(kept)
    masks = [_mask(positions, grid) for positions in each]
    words = titles or [f"{int(mask.sum())} of {mask.numel()} tokens" for mask in masks]
    made, places = _panels(len(masks), picture)
    for axes, positions, mask, title in zip(places, each, masks, words, strict=True):
        axes.imshow(highlighted(picture, positions, grid), interpolation="bilinear")
        _borders(axes, mask.long(), picture, ORANGE)
        axes.set_title(title, fontsize=TEXT)
    return made


def merge_map(image: Any, owner: Tensor, grid: Grid, title: str | None = None) -> Figure:
    """Which tokens were merged: a group has one colour, the mean of its patches, and a border.

    A dot marks the token that stands for a group of several.

    Args:
        image: As in :func:`tokens`.
        owner: For each patch the grid position of the token that stands for it, ``(N,)``.
        grid: Rows and columns of patches.
        title: Default: how many tokens there are.

    Raises:
        OptionError: If the image is none, or the grid has another number of patches.
    """
    picture, owner = as_picture(image), owner.detach().cpu().long().flatten()
    if owner.numel() != math.prod(grid):
        raise OptionError(f"owner of {owner.numel()} patches: the grid has {grid[0]} x {grid[1]}")
    made, (axes,) = _panels(1, picture)
    colours = _patch_means(picture, grid)
    sums = torch.zeros_like(colours).index_add(0, owner, colours)
    sizes = torch.bincount(owner, minlength=owner.numel())
    mean = (sums / sizes.clamp(min=1)[:, None])[owner]
    flat = _spread(mean.reshape(*grid, 3), picture).numpy()
    axes.imshow(FLAT * flat + (1 - FLAT) * picture, interpolation="nearest")
    _borders(axes, owner.reshape(grid), picture, "white")
    groups = (sizes > 1).nonzero().flatten()
    height, width = picture.shape[0] / grid[0], picture.shape[1] / grid[1]
    rows, columns = groups // grid[1], groups % grid[1]
    x, y = ((columns + 0.5) * width).numpy(), ((rows + 0.5) * height).numpy()
    axes.scatter(x, y, s=14, color="white", edgecolors="black", linewidths=0.7)
    left = int((sizes > 0).sum())
    axes.set_title(title or f"{owner.numel()} tokens merged into {left}", fontsize=TEXT)
    return made


def updated_share(selected: Sequence[Tensor], grid: Grid) -> Tensor:
    """Share of the gates that let each patch token through, ``(rows, columns)``.

    Args:
        selected: Gate by gate ``(1, N)``, bool; patch tokens are the last ones. Gates over another
            set of tokens than the first one's (a decoder's) are left out. No gates at all mean
            that everything was computed.
        grid: Rows and columns of patches.
    """
    patches = math.prod(grid)
    if not selected:
        return torch.ones(grid)
    count = selected[0].shape[1]
    masks = [mask[0, -patches:].float() for mask in selected if mask.shape[1] == count]
    return torch.stack(masks).mean(0).reshape(grid).cpu()


def updated(image: Any, share: Tensor) -> Picture:
    """A frame, grey and dim where tokens were reused and tinted where they were updated.

    Args:
        image: As in :func:`tokens`.
        share: From :func:`updated_share`.

    Returns:
        ``(H, W, 3)``, 0 to 1.
    """
    picture = as_picture(image)
    spread = _spread(share[..., None], picture).numpy()
    quiet = _quiet(picture)
    tinted = picture + STRENGTH * (np.array(TINT, np.float32) - picture)
    drawn: Picture = (quiet + spread * (tinted - quiet)).astype(np.float32)
    return drawn


def highlighted(picture: Picture, kept: Tensor, grid: Grid) -> Picture:
    """A picture ``(H, W, 3)``, 0 to 1, that is dim and grey outside of the patches at ``kept``."""
    bright = _spread(_mask(kept, grid)[..., None].float(), picture).numpy()
    drawn: Picture = (bright * picture + (1 - bright) * _quiet(picture)).astype(np.float32)
    return drawn


def as_picture(image: Any) -> Picture:
    """``(H, W, 3)``, 0 to 1, from an array, a tensor or a PIL picture.

    Raises:
        OptionError: If it has another shape.
    """
    values = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    if values.ndim == 3 and values.shape[2] != 3 and values.shape[0] == 3:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] != 3:
        raise OptionError(f"image of shape {values.shape}: expected (H, W, 3) or (3, H, W)")
    scale = 255 if np.issubdtype(values.dtype, np.integer) else 1
    picture: Picture = values.astype(np.float32) / np.float32(scale)
    return picture.clip(0, 1)


def _quiet(picture: Picture) -> Picture:
    dim: Picture = DIMMED * picture.mean(-1, keepdims=True)
    return dim


def _mask(kept: Tensor, grid: Grid) -> Tensor:
    kept, patches = kept.detach().cpu().flatten(), math.prod(grid)
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < patches:
        raise OptionError(f"positions up to {int(kept.max())}: the grid has {grid[0]} x {grid[1]}")
    mask = torch.zeros(patches, dtype=torch.bool)
    mask[kept] = True
    return mask.reshape(grid)


def _spread(values: Tensor, picture: Picture) -> Tensor:
    """One value a patch ``(rows, columns, C)`` as one a pixel ``(H, W, C)``."""
    rows, columns = (
        torch.arange(side) * count // side
        for side, count in zip(picture.shape[:2], values.shape[:2], strict=True)
    )
    return values[rows][:, columns]


def _patch_means(picture: Picture, grid: Grid) -> Tensor:
    """Mean colour of each patch, ``(N, 3)``."""
    channels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
    return torch.nn.functional.adaptive_avg_pool2d(channels, grid)[0].flatten(1).T


def _borders(axes: Axes, label: Tensor, picture: Picture, colour: str) -> None:
    """Lines between neighbouring patches of different label."""
    height, width = picture.shape[0] / label.shape[0], picture.shape[1] / label.shape[1]
    down = (label[1:] != label[:-1]).nonzero().tolist()
    across = (label[:, 1:] != label[:, :-1]).nonzero().tolist()
    flat = [[(c * width, (r + 1) * height), ((c + 1) * width, (r + 1) * height)] for r, c in down]
    upright = [
        [((c + 1) * width, r * height), ((c + 1) * width, (r + 1) * height)] for r, c in across
    ]
    shifted = [[(x - 0.5, y - 0.5) for x, y in line] for line in (*flat, *upright)]
    axes.add_collection(LineCollection(shifted, colors=colour, linewidths=0.8))


def _panels(count: int, picture: Picture) -> tuple[Figure, list[Axes]]:
    """A figure with so many empty panels of the proportions of ``picture``."""
    columns = 2 if count in (2, 4) else min(count, COLUMNS)
    rows = -(-count // columns)
    side = WIDTH / columns * picture.shape[0] / picture.shape[1]
    made, axes = figure(rows * (side + TITLE), rows, columns)
    for place in axes.flat:
        place.set_axis_off()
    return made, list(axes.flat)[:count]
