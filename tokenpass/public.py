"""Everything that ``import tokenpass`` offers; loaded when the first of it is asked for."""

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
from tokenpass.arrivals import mark_tokens
from tokenpass.backend import backend
from tokenpass.calibration import Calibration, calibrate
from tokenpass.cuts import Cut
from tokenpass.errors import (
    BrokenInvariantError,
    NothingRecordedError,
    OptionError,
    TokenpassError,
    TokenpassWarning,
)
from tokenpass.explain import budget_for, explain
from tokenpass.export import rewrite
from tokenpass.latency import LatencyTarget
from tokenpass.methods import Eventful, HiPrune
from tokenpass.report import Refusal, Report
from tokenpass.report_page import KeptTokens, html_report, kept_by_budget
from tokenpass.selection import select
from tokenpass.vision_language import VisionLanguageModel, vlm

__all__ = [
    "BlockStats",
    "BrokenInvariantError",
    "Calibration",
    "Cut",
    "Eventful",
    "HiPrune",
    "KeptTokens",
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
    "calibrate",
    "cuts",
    "explain",
    "html_report",
    "kept",
    "kept_by_budget",
    "load_state_dict",
    "mark_tokens",
    "report",
    "reset",
    "rewrite",
    "select",
    "selectors",
    "set_budget",
    "state_dict",
    "stats",
    "stream",
    "vlm",
]
