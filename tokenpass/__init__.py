"""Token reduction for vision transformers as a ``torch.compile`` backend."""

from tokenpass.api import BlockStats, Stats, kept, report, reset, set_budget, stats
from tokenpass.backend import backend
from tokenpass.errors import (
    BrokenInvariantError,
    NothingRecordedError,
    OptionError,
    TokenpassError,
    TokenpassWarning,
)
from tokenpass.explain import explain
from tokenpass.methods import HiPrune
from tokenpass.report import Refusal, Report
from tokenpass.selection import select

__version__ = "0.1.0"

__all__ = [
    "BlockStats",
    "BrokenInvariantError",
    "HiPrune",
    "NothingRecordedError",
    "OptionError",
    "Refusal",
    "Report",
    "Stats",
    "TokenpassError",
    "TokenpassWarning",
    "backend",
    "explain",
    "kept",
    "report",
    "reset",
    "select",
    "set_budget",
    "stats",
]
