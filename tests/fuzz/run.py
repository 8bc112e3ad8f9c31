"""Draws cases for some time, tries them, and writes down those that fail."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.grammar import cases
from tests.fuzz.properties import Outcome, check
from tests.fuzz.simplify import described, same_kind, simplified, write_test
from tests.fuzz.spec import Case

ROUND = 20
"""Cases drawn at a time."""


@dataclass
class Tally:
    """What came out so far.

    Attributes:
        cases: How many were tried.
        counts: How many were pruned, gated, tried with gates, compared at reduced budget.
        failures: Error and file of those that failed, one for each kind of error.
        repeats: Failures of a kind that was seen before.
        seconds: That it took.
    """

    cases: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Path] = field(default_factory=dict)
    repeats: int = 0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.counts["converted"] += outcome.converted
        self.counts["pruned"] += outcome.pruned
        self.counts["gating tried"] += outcome.gated is not None
        self.counts["gated"] += bool(outcome.gated)
        self.counts["compared"] += outcome.compared


def drawn(number: int, count: int) -> list[Case]:
    """``count`` cases, the same ones for the same ``number``."""
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def stream_of_cases(number: int) -> Iterator[Case]:
    """Cases without end; the plainest one, with which every round begins, only once."""
    seen: set[Case] = set()
    while True:
        for case in drawn(number, ROUND):
            if case not in seen:
                seen.add(case)
                yield case
        number += 1


def fuzz(
    seconds: float,
    number: int,
    folder: Path,
    *,
    most: int | None = None,
    shrinking: float = 120.0,
    note: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Try cases until time is up, or until somebody interrupts a case.

    Args:
        seconds: How long; a case or a simplification that was begun is finished.
        number: Seed.
        folder: Where failing cases go, as tests.
        most: Cases at most.
        shrinking: Seconds for simplifying a case that fails.
        note: Called after each case.
    """
    tally, start = Tally(), time.monotonic()
    for case in stream_of_cases(number):
        if tally.seconds >= seconds or tally.cases == most:
            break
        try:
            tally.add(check(case))
        except KeyboardInterrupt:
            break
        except Exception as error:
            _record(case, described(error), tally, folder, shrinking)
        tally.cases += 1
        tally.seconds = time.monotonic() - start
        note(tally)
    return tally


def _record(case: Case, error: str, tally: Tally, folder: Path, shrinking: float) -> None:
    if any(same_kind(error, known) for known in tally.failures):
        tally.repeats += 1
        write_test(case, error, folder / "repeats")
        return
    plain = simplified(case, error, shrinking)
    tally.failures[error] = write_test(plain, error, folder)
