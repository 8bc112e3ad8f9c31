"""Breaks if a curve shows other numbers than it was given."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

import tokenpass
from tests import tiny
from tokenpass import plot
from tokenpass.api import Stats
from tokenpass.errors import OptionError

ROWS = [
    {"keep": 0.25, "flops": 0.6, "ms": 12.0, "loss": 1.5, "loss_error": 0.5, "random_loss": 4.0},
    {"keep": 0.5, "flops": 0.8, "ms": 15.0, "loss": 0.25, "random_loss": 1.0},
]


def heights(figure: object, container: int) -> list[float]:
    return [bar.get_height() for bar in figure.axes[0].containers[container]]  # type: ignore[attr-defined]


def numbers(values: ArrayLike) -> list[Any]:
    found: list[Any] = np.asarray(values).tolist()
    return found


def test_flow_of_pruning() -> None:
    report = tokenpass.explain(tiny.encoder(depth=4), tiny.images(), method=tokenpass.HiPrune())
    rows = report.graphs[0].blocks
    figure = plot.flow(report)
    assert heights(figure, 0) == [row.tokens_in for row in rows]
    assert heights(figure, 1) == [tiny.TOKENS - row.tokens_in for row in rows]


def test_flow_of_gating() -> None:
    method = tokenpass.Eventful(keep=0.25)
    figure = plot.flow(tokenpass.explain(tiny.encoder(), tiny.images(), method=method))
    assert heights(figure, 0) == [4, 4]
    assert heights(figure, 1) == [12, 12]


def test_flow_of_nothing() -> None:
    report = tokenpass.explain(torch.nn.Linear(3, 3), torch.zeros(1, 3))
    with pytest.raises(OptionError, match="without blocks"):
        plot.flow(report)


def test_pareto_shows_all_rows() -> None:
    figure = plot.pareto(ROWS, max_loss=0.5, chosen=0.5)
    axes = figure.axes[0]
    line = {item.get_label(): numbers(item.get_xydata()) for item in axes.lines}
    assert line["random tokens"] == [[0.6, 4.0], [0.8, 1.0]]
    assert line["keep 0.5"] == [[0.8, 0.25]]
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.5"]
    timed = plot.pareto(ROWS, cost="ms").axes[0].lines[0]
    assert numbers(timed.get_xydata()) == [[12.0, 1.5], [15.0, 0.25]]
    with pytest.raises(OptionError, match=r"cost='watts': choose one of 'flops', 'ms'"):
        plot.pareto(ROWS, cost="watts")
    with pytest.raises(OptionError, match="nothing to draw"):
        plot.pareto([])


def test_timeline_shows_all_frames() -> None:
    stats = [
        Stats([], 100, 100, [1.0, 1.0], computed_in_full="first frame"),
        Stats([], 40, 100, [0.2, 0.4]),
    ]
    figure = plot.timeline(stats, [30.0, 12.0])
    drawn = [numbers(axes.lines[0].get_ydata()) for axes in figure.axes]
    assert drawn == [[1.0, pytest.approx(0.3)], [1.0, 0.4], [30, 12]]
    with pytest.raises(OptionError, match=re.escape("1 times of 2 frames")):
        plot.timeline(stats, [1.0])
    with pytest.raises(OptionError, match="no frames"):
        plot.timeline([])
