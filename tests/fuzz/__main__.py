"""``python -m tests.fuzz --seconds 600 --seed 0``: fuzz, with a progress bar and a summary."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.fuzz.run import Tally, fuzz

FAILURES = Path("fuzz-failures")

LINE = 100
"""Cases between two lines where there is no terminal to draw a bar on."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=None, help="stop after so many")
    parser.add_argument(
        "--shrinking", type=float, default=60.0, help="seconds for simplifying a failing case"
    )
    parser.add_argument("--failures", type=Path, default=FAILURES, help="where failing cases go")
    return parser.parse_args()


def summary(tally: Tally) -> Table:
    """What came out."""
    counts, cases = tally.counts, max(1, tally.cases)
    rows = {
        "cases": f"{tally.cases} in {tally.seconds:.0f} s, {tally.seconds / cases:.2f} s each",
        "converted": f"{counts['converted'] / cases:.0%}",
        "pruned": f"{counts['pruned'] / cases:.0%}",
        "gated": f"{counts['gated'] / max(1, counts['gating tried']):.0%} "
        f"of {counts['gating tried']} that were tried",
        "compared at reduced budget": f"{counts['compared'] / cases:.0%}",
        "failures": f"{len(tally.failures)} kinds, {tally.repeats} more of these kinds",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, text)
    for error, path in tally.failures.items():
        table.add_row(f"[red]{path}", error[:200], style="red")
    return table


def watched(
    console: Console,
    seconds: float,
    seed: int,
    failures: Path,
    *,
    most: int | None = None,
    shrinking: float = 60.0,
) -> Tally:
    """Fuzz on one thread, with a progress bar on ``console``; arguments as of :func:`fuzz`."""
    torch.set_num_threads(1)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=seconds)

        def note(tally: Tally) -> None:
            words = f"{tally.cases} cases, {len(tally.failures) + tally.repeats} failed"
            progress.update(task, completed=tally.seconds, description=words)
            if not console.is_terminal and tally.cases % LINE == 0:
                console.print(f"{words}, {tally.seconds:.0f} s")

        return fuzz(seconds, seed, failures, most=most, shrinking=shrinking, note=note)


def main() -> int:
    given = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    tally = watched(
        console,
        given.seconds,
        given.seed,
        given.failures,
        most=given.cases,
        shrinking=given.shrinking,
    )
    console.print(summary(tally))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
