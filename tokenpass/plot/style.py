"""How all figures look: size, type, and colours that colour-blind people tell apart."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 6.0
"""Inches; at :data:`DPI` 600 pixels."""
DPI = 100
TEXT = 9
"""Points: 12 pixels."""

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#e69f00", "#009e73", "#7f7f7f"
"""From the palette of Okabe and Ito, which keeps its contrast for all kinds of colour vision."""


def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """An empty figure of the common width.

    Args:
        height: In inches.
        rows: Of axes.
        columns: Of axes.
        **options: Of ``Figure.subplots``.

    Returns:
        The figure and an array of its axes, ``(rows, columns)``.
    """
    made = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, **options)


def plain(axes: Axes, x: str, y: str) -> None:
    """Labels, and no more lines than needed."""
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.tick_params(labelsize=TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
