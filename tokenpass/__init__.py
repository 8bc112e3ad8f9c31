"""Token reduction for vision transformers as a ``torch.compile`` backend."""

from importlib import import_module
from typing import Any

from tokenpass import selectors
from tokenpass.api import (
    BlockStats,
    Stats,
    cuts,
    kept,
    load_state_dict,
    report,
    reset,
    set_budget,
    state_dict,
    stats,
    stream,
)
from tokenpass.backend import backend
from tokenpass.cuts import Cut
from tokenpass.errors import (
    BrokenInvariantError,
    NothingRecordedError,
    OptionError,
    TokenpassError,
    TokenpassWarning,
)
from tokenpass.explain import budget_for, explain
from tokenpass.latency import LatencyTarget
from tokenpass.methods import Eventful, HiPrune
from tokenpass.report import Refusal, Report
from tokenpass.selection import select
from tokenpass.vision_language import VisionLanguageModel, vlm

__version__ = "0.1.0"

__all__ = [
    "BlockStats",
    "BrokenInvariantError",
    "Cut",
    "Eventful",
    "HiPrune",
    "LatencyTarget",
    "NothingRecordedError",
    "OptionError",
    "Refusal",
    "Report",
    "Stats",
    "TokenpassError",
    "TokenpassWarning",
    "VisionLanguageModel",
    "backend",
    "budget_for",
    "cuts",
    "explain",
    "kept",
    "load_state_dict",
    "report",
    "reset",
    "select",
    "selectors",
    "set_budget",
    "state_dict",
    "stats",
    "stream",
    "vlm",
]


def __getattr__(name: str) -> Any:
    """:mod:`tokenpass.plot`, imported when it is used: it needs matplotlib."""
    if name == "plot":
        return import_module("tokenpass.plot")
    raise AttributeError(f"module 'tokenpass' has no attribute {name!r}")
