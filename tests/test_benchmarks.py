"""The measurements' own arithmetic, and that what is published is what was measured.

Breaks if a ratio pairs times of different rounds, a bar accepts what it should refuse or looks at
other rows, a result overwrites that of another case, or a table in a README was written by hand.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, readme, run, suite
from benchmarks.bars import BARS, Bar, verdict
from benchmarks.plots import Plot, save_plot
from benchmarks.suite import Column, Suite, timed
from benchmarks.timing import Times, interleaved
from tests.house.test_layers import ROOT


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.plots.RESULTS", tmp_path)
    return tmp_path


def test_variants_take_turns() -> None:
    calls: list[str] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleaved(variants, rounds=3, warm_up=0)
    assert calls == list("abcbcacab")
    assert all(len(found.seconds) == 3 for found in times.values())


def test_ratios_are_taken_round_by_round() -> None:
    slow_machine = (1.0, 10.0, 2.0)
    mine = Times(tuple(0.5 * second for second in slow_machine))
    its = Times(slow_machine)
    assert mine.ratio_to(its) == 0.5
    row = timed(mine, its)
    assert (row["median_ms"], row["time_ratio"]) == (1000.0, 0.5)
    assert row["iqr_ms"] == pytest.approx(2250.0)


def test_cases_replace_their_like_and_leave_others(results: Path) -> None:
    for batch, value in ((8, 1), (1, 2), (8, 3)):
        suite.record("made-up", {"batch": batch}, [{"value": value}])
    found = suite.cases("made-up")
    assert [(item["case"]["batch"], item["rows"][0]["value"]) for item in found] == [(1, 2), (8, 3)]
    assert suite.rows_of("made-up") == [{"batch": 1, "value": 2}, {"batch": 8, "value": 3}]
    for item in found:
        assert {"commit", "device", "threads", "torch", "date"} <= item["environment"].keys()
    assert len(list(results.iterdir())) == 1


def test_a_suite_measures_writes_and_draws(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(wanted: Any) -> Any:
        for size in wanted.sizes:
            yield {"size": size}, [{"value": size * wanted.rounds, "nothing": None}]

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sizes", type=int, nargs="+")

    made_up = Suite(
        "made-up",
        "nothing",
        options,
        measure,
        (Column("size", "size"), Column("value", "value", ".1f"), Column("no", "nothing", ".1f")),
        Plot(("size", "size"), ("value", "value"), by=()),
    )
    monkeypatch.setattr("sys.argv", ["made-up", "--rounds", "2", "--sizes", "1", "3"])
    monkeypatch.setattr(suite, "prepare", lambda threads: None)
    made_up.main()
    printed = capsys.readouterr().out
    assert "| 3    | 6.0   |    |" in printed
    assert {path.suffix for path in results.iterdir()} == {".json", ".png"}


def test_nothing_is_drawn_of_nothing(results: Path) -> None:
    assert save_plot(Plot(("x", "x"), ("y", "y"), by=()), [{"x": 1}], "empty") is None


ROWS = [{"keep": 0.5, "value": 1.2}, {"keep": 0.5, "value": 0.9}, {"keep": 0.7, "value": 3.0}]


@pytest.mark.parametrize(
    ("where", "limits", "expected"),
    [
        ({"keep": 0.5}, {"at_most": 1.2}, ("at most 1.2", "1.200", "pass")),
        ({"keep": 0.5}, {"at_most": 1.1}, ("at most 1.1", "1.200", "FAIL")),
        ({"keep": 0.5}, {"at_least": 0.9}, ("at least 0.9", "0.900", "pass")),
        ({"keep": 0.5}, {"at_least": 1.0}, ("at least 1", "0.900", "FAIL")),
        ({"keep": 0.6}, {"at_least": 1.0}, ("at least 1", "", "not measured")),
    ],
)
def test_a_bar_holds_for_the_worst_row(
    where: dict[str, float], limits: dict[str, float], expected: tuple[str, str, str]
) -> None:
    bar = Bar("words", "made-up", where, "value", **limits)
    assert verdict(bar, ROWS)[1:] == expected


def test_bars_are_about_suites_and_fields_that_exist() -> None:
    """Breaks if a suite renames a field that a bar reads, so that it would pass unmeasured."""
    for bar in BARS:
        assert bar.suite in run.SUITES
        assert (bar.at_most is None) != (bar.at_least is None)
        rows = suite.rows_of(bar.suite)
        assert not rows or any(bar.field in row for row in rows), bar.says
    assert len({bar.says + bar.asked for bar in BARS}) == len(BARS)


@pytest.mark.parametrize("name", run.SUITES)
def test_every_suite_can_be_run_by_its_name(name: str) -> None:
    found = importlib.import_module(run.SUITES[name]).SUITE
    assert found.name == name


@pytest.mark.parametrize("path", ["README.md", "benchmarks/README.md", "docs/vlm.md"])
def test_published_tables_are_the_results(path: str) -> None:
    """``python -m benchmarks.readme`` writes them."""
    text = (ROOT / path).read_text()
    assert readme.BETWEEN.search(text), "no table"
    assert readme.filled(text) == text


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")))
def test_results_say_where_they_come_from(path: Path) -> None:
    content = json.loads(path.read_text())
    for item in content.get("cases", [content]):
        assert {"commit", "device", "threads", "torch", "date"} <= item["environment"].keys()


def test_strict_fails_unless_all_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bars, "verdicts", lambda kind=None: [("words", "at most 1", "2.000", "FAIL")]
    )
    monkeypatch.setattr("sys.argv", ["bars", "--strict"])
    with pytest.raises(SystemExit):
        bars.main()
