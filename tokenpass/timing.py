"""Wall time of several variants of one computation, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Call = Callable[[], Any]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Times:
    """Seconds of each round of a variant, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def ratio_to(self, baseline: Times) -> float:
        """Median over the rounds of this time to that of ``baseline`` in the same round."""
        pairs = zip(self.seconds, baseline.seconds, strict=True)
        return statistics.median(mine / its for mine, its in pairs)


def interleaved(
    variants: Mapping[Name, Call],
    rounds: int,
    warm_up: int = 2,
    before: Mapping[Name, Call] | None = None,
) -> dict[Name, Times]:
    """Time each variant once a round, each round starting with another one.

    What slows the machine for a while slows all variants alike.

    Args:
        variants: What to time.
        rounds: How often.
        warm_up: Calls of each that are not timed.
        before: What is called before a variant, and is not part of its time.
    """
    ready = before or {}
    for name, call in variants.items():
        for _ in range(warm_up):
            ready.get(name, _nothing)()
            call()
    names = list(variants)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            ready.get(name, _nothing)()
            seconds[name].append(once(variants[name]))
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def _nothing() -> None:
    """Before a variant that needs no preparation."""


def timed(call: Call, rounds: int, warm_up: int = 2) -> Times:
    """Time one computation by itself."""
    return interleaved({"": call}, rounds, warm_up)[""]


def once(call: Call) -> float:
    """Seconds of one call, until the device is done."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
