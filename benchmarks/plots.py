"""One kind of plot for all suites: one field against another, a line for each variant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, device

INCHES = (6.4, 4.2)
DOTS_PER_INCH = 90


@dataclass(frozen=True)
class Plot:
    """What is drawn.

    Attributes:
        x: The field along the horizontal axis, and its label.
        y: The same, vertically.
        by: Fields that tell the lines apart.
        diagonal: Whether to draw where both are equal.
        log: Whether both axes are logarithmic.
        only: Values that fields of a row must have to be drawn.
    """

    x: tuple[str, str]
    y: tuple[str, str]
    by: Sequence[str]
    diagonal: bool = False
    log: bool = False
    only: Mapping[str, Any] | None = None


def save_plot(plot: Plot, rows: Iterable[Mapping[str, Any]], name: str) -> Path | None:
    """Draw rows into ``results/<name>-<device>.png``; nothing if no row has both fields."""
    lines = _lines(plot, rows)
    if not lines:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
    if plot.diagonal:
        ends = [value for points in lines.values() for point in points for value in point]
        ends = [min(ends), max(ends)]
        axes.plot(ends, ends, color="grey", linestyle=":", linewidth=1, label="equal")
    if plot.log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel(plot.x[1])
    axes.set_ylabel(plot.y[1])
    axes.grid(alpha=0.3)
    if any(lines) or plot.diagonal:
        axes.legend(fontsize="small")
    path = RESULTS / f"{name}-{device().type}.png"
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _lines(plot: Plot, rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Points of each line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        drawn = all(row.get(field) == value for field, value in (plot.only or {}).items())
        x, y = row.get(plot.x[0]), row.get(plot.y[0])
        if drawn and x is not None and y is not None:
            label = ", ".join(str(row[field]) for field in plot.by if row.get(field) is not None)
            lines.setdefault(label, []).append((x, y))
    return lines
