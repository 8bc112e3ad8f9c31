"""What every suite of measurements is: cases, rows, a table, a plot and a command line.

A results file holds *cases*, such as a model at a batch size, each with the environment that it was
measured in. A later run replaces the cases that it measures and leaves the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from benchmarks.environment import RESULTS, device, environment, prepare
from benchmarks.plots import Plot, save_plot
from benchmarks.tables import markdown
from benchmarks.timing import Times

Row = dict[str, Any]
Case = tuple[dict[str, Any], list[Row]]
"""What tells a case from others, and what was measured in it."""


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, the field that it shows, and how."""

    title: str
    field: str
    form: str = ""

    def cell(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.field)
        return "" if value is None else format(value, self.form)


@dataclass(frozen=True)
class Suite:
    """A set of measurements that one command makes.

    Attributes:
        name: Of the results: ``results/<name>-<device>.json``.
        about: What is measured, in a line.
        options: Adds the suite's own arguments.
        measure: The cases, one by one: each is written as soon as it is there.
        columns: Of the table.
        plot: What to draw, if anything.
        rounds: How often each variant is timed unless the command line says otherwise.
    """

    name: str
    about: str
    options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], Iterator[Case]]
    columns: Sequence[Column]
    plot: Plot | None = None
    rounds: int = 15

    def table(self, rows: Iterable[Row]) -> str:
        """Rows in Markdown."""
        titles = [column.title for column in self.columns]
        return markdown(titles, [[column.cell(row) for column in self.columns] for row in rows])

    def main(self) -> None:
        """Measure what the command line asks for; print and write it."""
        parser = argparse.ArgumentParser(description=self.about)
        parser.add_argument("--rounds", type=int, default=self.rounds)
        parser.add_argument("--threads", type=int, default=2)
        self.options(parser)
        arguments = parser.parse_args()
        prepare(arguments.threads)
        for case, rows in self.measure(arguments):
            record(self.name, case, rows)
            print(self.table({**case, **row} for row in rows), flush=True)
        if self.plot is not None:
            save_plot(self.plot, rows_of(self.name), self.name)
        Console().print(f"written: {self.name}-{device().type}.json")


def record(name: str, case: dict[str, Any], rows: list[Row]) -> None:
    """Write a case into the results, in the place of the same one measured earlier."""
    others = [item for item in cases(name) if item["case"] != case]
    added = {"case": case, "environment": environment(), "rows": rows}
    everything = sorted([*others, added], key=lambda item: _order(item["case"]))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device().type}.json"
    path.write_text(json.dumps({"cases": everything}, indent=1) + "\n", encoding="utf-8")


def cases(name: str, kind: str | None = None) -> list[dict[str, Any]]:
    """The cases that were measured: ``case``, ``environment`` and ``rows`` of each.

    Args:
        name: Of the suite.
        kind: Of device; default this machine's.
    """
    path = RESULTS / f"{name}-{kind or device().type}.json"
    if not path.exists():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return found


def rows_of(name: str, kind: str | None = None) -> list[Row]:
    """All rows, each with the fields of its case."""
    return [{**item["case"], **row} for item in cases(name, kind) for row in item["rows"]]


def _order(case: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Numbers by size, words by alphabet, field by field."""
    return [
        (key, value, "") if isinstance(value, (int, float)) else (key, 0.0, str(value))
        for key, value in case.items()
    ]


def timed(times: Times, baseline: Times | None = None) -> Row:
    """The fields of a variant that was timed, in milliseconds."""
    row: Row = {
        "median_ms": round(1e3 * times.median, 3),
        "iqr_ms": round(1e3 * times.spread, 3),
        "rounds_ms": [round(1e3 * second, 2) for second in times.seconds],
    }
    if baseline is not None:
        row["time_ratio"] = round(times.ratio_to(baseline), 4)
    return row
