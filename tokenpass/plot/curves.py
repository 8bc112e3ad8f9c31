"""Numbers as curves: tokens through the depth, loss against cost, frames of a video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tokenpass.api import Stats
from tokenpass.errors import OptionError
from tokenpass.plot.style import BLUE, GREEN, GREY, ORANGE, TEXT, figure, plain
from tokenpass.report import Report

COSTS = {"flops": "FLOPs, share of all", "ms": "milliseconds an image"}
"""Keys of a result that are costs, and what they are called."""


def flow(report: Report) -> Figure:
    """Patch tokens at each block: those that it computes on, and those that it does not.

    Args:
        report: Of :func:`tokenpass.explain` or :func:`tokenpass.report`.

    Raises:
        OptionError: If no block was found.
    """
    rows = [row for graph in report.graphs for row in graph.blocks]
    if not rows:
        raise OptionError("a report without blocks: there is no flow to draw")
    whole = [graph.tokens for graph in report.graphs for _ in graph.blocks]
    used = [row.tokens_in if row.updated is None else row.updated for row in rows]
    gated = any(row.updated is not None for row in rows)
    numbers = range(1, len(rows) + 1)
    made, ((axes,),) = figure(2.8)
    axes.bar(numbers, used, color=BLUE, width=0.85, label="computed")
    rest = [total - some for total, some in zip(whole, used, strict=True)]
    name = "reused from earlier frames" if gated else "left before"
    axes.bar(numbers, rest, bottom=used, color=GREY, alpha=0.25, width=0.85, label=name)
    labelled = [n for n in numbers if n == 1 or used[n - 1] != used[n - 2]]
    for n in labelled:
        axes.annotate(str(used[n - 1]), (n, used[n - 1]), ha="center", va="bottom", fontsize=TEXT)
    plain(axes, "block", "patch tokens")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.3 * max(whole))
    axes.legend(fontsize=TEXT, frameon=False, ncols=2, loc="upper right")
    share = report.flops / report.flops_before if report.flops_before else 1.0
    axes.set_title(f"{share:.2f} of the FLOPs", fontsize=TEXT, loc="left")
    return made


def pareto(
    results: Sequence[Mapping[str, Any]],
    *,
    cost: str = "flops",
    max_loss: float | None = None,
    chosen: float | None = None,
) -> Figure:
    """Loss against cost over budgets, with random selection beside it.

    Args:
        results: Rows with ``keep``, ``flops`` (a share), ``ms``, ``loss`` and maybe ``loss_error``
            and ``random_loss``, as ``tokenpass tune`` writes them; losses in points.
        cost: ``"flops"`` or ``"ms"``.
        max_loss: Drawn as a line.
        chosen: The ``keep`` of a row that is pointed out.

    Raises:
        OptionError: If there is no such cost, or no result.
    """
    if cost not in COSTS:
        raise OptionError(f"cost={cost!r}: choose one of {', '.join(map(repr, COSTS))}")
    rows = sorted((row for row in results if row.get(cost) is not None), key=lambda row: row[cost])
    if not rows:
        raise OptionError(f"no result has {cost!r}: there is nothing to draw")
    made, ((axes,),) = figure(3.6)
    costs = [row[cost] for row in rows]
    errors = [row.get("loss_error") or 0.0 for row in rows]
    losses = [row["loss"] for row in rows]
    axes.errorbar(
        costs, losses, yerr=errors, color=BLUE, marker="o", capsize=2, label="chosen tokens"
    )
    random = [row for row in rows if row.get("random_loss") is not None]
    if random:
        axes.plot(
            [row[cost] for row in random],
            [row["random_loss"] for row in random],
            color=ORANGE,
            marker="s",
            linestyle="--",
            label="random tokens",
        )
    for row in rows:
        axes.annotate(
            f"{row['keep']:g}",
            (row[cost], row["loss"]),
            xytext=(0, -13),
            textcoords="offset points",
            ha="center",
            fontsize=TEXT - 1,
            color=BLUE,
        )
    if max_loss is not None:
        axes.axhline(max_loss, color=GREY, linestyle=":", label=f"at most {max_loss:g}")
    for row in rows:
        if row["keep"] == chosen:
            axes.plot(
                row[cost],
                row["loss"],
                marker="o",
                markersize=15,
                fillstyle="none",
                markeredgewidth=1.8,
                color=GREEN,
                linestyle="none",
                label=f"keep {row['keep']:g}",
            )
    axes.margins(y=0.18)
    plain(axes, COSTS[cost], "loss, points")
    axes.legend(fontsize=TEXT, frameon=False)
    return made


def timeline(stats: Sequence[Stats], milliseconds: Sequence[float] | None = None) -> Figure:
    """Frames of a video: the share of the tokens that was updated, the FLOPs and the time.

    Args:
        stats: Of :func:`tokenpass.stats` after each frame.
        milliseconds: Of each frame.

    Raises:
        OptionError: If there is no frame, or there are not as many times.
    """
    if not stats:
        raise OptionError("no frames: there is no timeline to draw")
    if milliseconds is not None and len(milliseconds) != len(stats):
        raise OptionError(f"{len(milliseconds)} times of {len(stats)} frames")
    panels = 2 + (milliseconds is not None)
    made, places = figure(1.5 * panels, panels, sharex=True)
    numbers = range(len(stats))
    rates = [sum(s.update_rates) / len(s.update_rates) if s.update_rates else 1.0 for s in stats]
    shares = [s.flops / s.flops_before if s.flops_before else 1.0 for s in stats]
    series = [("tokens\nupdated", rates, BLUE), ("of the\nFLOPs", shares, GREEN)]
    if milliseconds is not None:
        series.append(("ms", list(milliseconds), ORANGE))
    full = [n for n, s in enumerate(stats) if s.computed_in_full]
    for axes, (name, values, colour) in zip(places[:, 0], series, strict=True):
        axes.plot(numbers, values, color=colour, marker=".", markersize=4)
        for n in full:
            axes.axvline(n, color=GREY, alpha=0.5, linestyle=":")
        plain(axes, "", name)
        axes.set_ylim(bottom=0)
    for axes in places[:2, 0]:
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    last = places[-1, 0]
    last.set_xlabel("frame (dotted: computed in full)", fontsize=TEXT)
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    return made
