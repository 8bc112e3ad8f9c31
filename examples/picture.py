"""What the demo draws: a photograph with its kept tokens, and two saliency maps."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor

from tokenpass.plot.pictures import Picture, highlighted

MAP = {"cmap": "magma", "vmin": 0.0, "vmax": 1.0}


def draw(
    path: Path, photo: Picture, kept: Tensor, grid: tuple[int, int], full: Tensor, pruned: Tensor
) -> None:
    """Write the picture.

    Args:
        path: Of the PNG.
        photo: ``(H, W, 3)``, 0 to 1.
        kept: Grid positions, ``(K,)``.
        grid: Rows and columns of patches.
        full: Saliency of the unpruned model, ``(H, W)``.
        pruned: Of the pruned one.
    """
    figure, axes = pyplot.subplots(1, 3, figsize=(13.5, 4.9), layout="constrained")
    error = float((full - pruned).abs().mean())
    _show(axes[0], f"kept tokens: {len(kept)} of {grid[0] * grid[1]}")
    axes[0].imshow(highlighted(photo, kept, grid))
    _show(axes[1], "saliency, all tokens")
    axes[1].imshow(full.numpy(), **MAP)
    _show(axes[2], f"saliency, pruned (mean error {error:.4f})")
    drawn = axes[2].imshow(pruned.numpy(), **MAP)
    figure.colorbar(drawn, ax=axes[1:], shrink=0.8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _show(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_axis_off()
