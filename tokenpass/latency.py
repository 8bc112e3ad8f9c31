"""Holding a latency: the budget of a gated model follows the times of its frames."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokenpass.api import set_budget, stats
from tokenpass.errors import OptionError
from tokenpass.methods import check_budget

MEMORY = 16
"""Frames that the fit of time against budget looks back on."""

STEP = 0.5
"""Share of the way to the wanted budget that one frame goes: damps what noise there is."""

BAND = 0.1
"""A time between the target and this share below it is good: the budget stays."""


@dataclass
class LatencyTarget:
    """Steers ``keep`` so that a frame takes ``ms`` milliseconds at most, and not much less.

    The time of a frame is taken to be a line over its budget, fitted to the last frames; a single
    slow frame moves nothing, because times are compared by their median.

    Attributes:
        ms: The time that a frame may take, in milliseconds.
        lowest: Share of the tokens that is updated in any case.
        highest: Share that is not exceeded.
        keep: The budget of the next frame.
        clock: Seconds; another one for tests.

    Raises:
        OptionError: If the time is not positive, or the bounds are no shares in order.
    """

    ms: float
    lowest: float = 0.05
    highest: float = 1.0
    keep: float = 0.25
    clock: Callable[[], float] = time.perf_counter
    _frames: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MEMORY))

    def __post_init__(self) -> None:
        if not self.ms > 0:
            raise OptionError(f"ms={self.ms!r}: expected a positive number of milliseconds")
        for name in ("lowest", "highest", "keep"):
            check_budget(name, float(getattr(self, name)))
        if self.lowest > self.highest:
            raise OptionError(f"lowest={self.lowest} is above highest={self.highest}")
        self.keep = min(max(self.keep, self.lowest), self.highest)

    def run(self, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a compiled model on a frame, and set the budget of the next one.

        A frame that was computed in full says nothing about budgets and is not counted.
        """
        begun = self.clock()
        outputs = compiled(*args, **kwargs)
        milliseconds = (self.clock() - begun) * 1e3
        if not stats(compiled).computed_in_full:
            self.observe(milliseconds)
        set_budget(compiled, keep=self.keep)
        return outputs

    def observe(self, milliseconds: float) -> float:
        """Take note of a frame's time at the present budget; returns the next budget."""
        self._frames.append((self.keep, milliseconds))
        recent = [ms for keep, ms in list(self._frames)[-3:]]
        now = statistics.median(recent)
        if not (1.0 - BAND) * self.ms <= now <= self.ms:
            aim = (1.0 - BAND / 2) * self.ms
            wanted = self._budget_for(aim, now)
            self.keep += STEP * (wanted - self.keep)
            self.keep = min(max(self.keep, self.lowest), self.highest)
        return self.keep

    def _budget_for(self, aim: float, now: float) -> float:
        """The budget at which a frame would take ``aim``."""
        keeps = [keep for keep, _ in self._frames]
        times = [ms for _, ms in self._frames]
        slope = now / self.keep
        if max(keeps) - min(keeps) > BAND * max(keeps):
            fitted = statistics.linear_regression(keeps, times).slope
            slope = min(max(fitted, slope * BAND), slope)
        return self.keep + (aim - now) / slope
