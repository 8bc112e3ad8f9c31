"""``make bench-bars``: what is asked for, and whether the results on disk reach it.

``python -m benchmarks.bars`` reads benchmarks/results and measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.suite import Row, rows_of
from benchmarks.tables import markdown


@dataclass(frozen=True)
class Bar:
    """One line of acceptance; holds for the worst of the rows that it is about.

    Attributes:
        says: In words.
        suite: Whose results it is about.
        where: Values that fields of a row have.
        field: What is held to the bar.
        at_most: The most that it may be.
        at_least: The least.
    """

    says: str
    suite: str
    where: Mapping[str, Any]
    field: str
    at_most: float | None = None
    at_least: float | None = None

    def found(self, rows: Iterable[Row]) -> list[float]:
        """What was measured, best first."""
        values = [
            float(row[self.field])
            for row in rows
            if row.get(self.field) is not None
            and all(row.get(name) == value for name, value in self.where.items())
        ]
        return sorted(values, reverse=self.at_least is not None)

    def holds(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (
            self.at_least is None or value >= self.at_least
        )

    @property
    def asked(self) -> str:
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return f"at least {self.at_least:g}"


SMALL = {"model": "vit_small_patch16_224", "size": 224, "batch": 8, "dtype": "float32"}
BASE = {"model": "vit_base_patch16_384", "size": 384, "batch": 1, "dtype": "float32"}
WALK = {"frames": "random walk", "variant": "exact"}


def pruned(says: str, case: dict[str, Any], keep: float) -> Bar:
    where = {**case, "variant": "tokenpass", "budget": keep}
    return Bar(f"{says}, keep {keep:g}: time / FLOPs", "prune", where, "time_over_flops", 1.10)


def gated(tokens: int, keep: float, field: str, at_least: float) -> Bar:
    words = {"speed_up": "speed-up", "speed_up_over_flops": "speed-up / FLOPs"}[field]
    where = {**WALK, "tokens": tokens, "keep": keep}
    says = f"gates, {tokens} tokens, keep {keep:g}: {words}"
    return Bar(says, "gate", where, field, at_least=at_least)


BARS = (
    *(pruned("ViT-S/16 224, batch 8", SMALL, keep) for keep in (0.7, 0.5, 0.25)),
    *(pruned("ViT-B/16 384, batch 1", BASE, keep) for keep in (0.7, 0.5, 0.25)),
    Bar(
        "ViT-S/16 224, batch 8, keep 1: time / Inductor",
        "prune",
        {**SMALL, "variant": "tokenpass", "budget": 1.0},
        "time_ratio",
        1.01,
    ),
    Bar("scores of two layers, 196 tokens", "score", {"tokens": 196}, "time_ratio", 0.02),
    Bar("scores of two layers, 4096 tokens", "score", {"tokens": 4096}, "time_ratio", 0.08),
    gated(1764, 0.10, "speed_up_over_flops", 0.85),
    gated(4096, 0.05, "speed_up_over_flops", 0.85),
    gated(784, 0.25, "speed_up", 1.8),
    gated(784, 0.10, "speed_up", 3.2),
    gated(1764, 0.10, "speed_up_over_flops", 0.75),
    Bar("gates, any size and keep: speed-up", "gate", WALK, "speed_up", at_least=0.97),
    Bar(
        "changing budgets: time / fixed budget's",
        "budget",
        {"method": "hiprune", "variant": "changing"},
        "time_ratio",
        1.03,
    ),
    Bar("changing budgets: graphs compiled after warm-up", "budget", {}, "recompilations", 0),
    Bar("passes, share of compiling", "compile", {"inner": "inductor"}, "share", 0.10),
    Bar(
        "a stream's state, in N x C x blocks floats",
        "memory",
        {"what": "a gated stream, exact"},
        "units",
        10,
    ),
    Bar(
        "predicted over measured time, off by",
        "predict",
        {},
        "off_by",
        0.20,
    ),
)


def verdict(bar: Bar, rows: Iterable[Row]) -> tuple[str, str, str, str]:
    """What is asked for, beside the worst that was measured, and whether that is enough."""
    found = bar.found(rows)
    if not found:
        return bar.says, bar.asked, "", "not measured"
    return bar.says, bar.asked, f"{found[-1]:.3f}", "pass" if bar.holds(found[-1]) else "FAIL"


def verdicts(kind: str | None = None) -> list[tuple[str, str, str, str]]:
    """Of all bars, on a kind of device."""
    rows = {suite: rows_of(suite, kind) for suite in {bar.suite for bar in BARS}}
    return [verdict(bar, rows[bar.suite]) for bar in BARS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strict", action="store_true", help="fail unless every bar is reached")
    lines = verdicts()
    strict = parser.parse_args().strict
    print(markdown(("bar", "asked", "measured", ""), lines))
    if strict and any(state != "pass" for *_, state in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
