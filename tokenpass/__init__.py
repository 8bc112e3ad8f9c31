"""Token reduction for vision transformers as a ``torch.compile`` backend."""

from tokenpass import selectors
from tokenpass.api import (
    BlockStats,
    Stats,
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
from tokenpass.calibration import Calibration, calibrate
from tokenpass.errors import (
    BrokenInvariantError,
    NothingRecordedError,
    OptionError,
    TokenpassError,
    TokenpassWarning,
)
from tokenpass.explain import explain
from tokenpass.latency import LatencyTarget
from tokenpass.methods import Eventful, HiPrune
from tokenpass.report import Refusal, Report
from tokenpass.selection import select
from tokenpass.vision_language import VisionLanguageModel, vlm

__version__ = "0.1.0"

__all__ = [
    "BlockStats",
    "BrokenInvariantError",
    "Calibration",
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
    "calibrate",
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
