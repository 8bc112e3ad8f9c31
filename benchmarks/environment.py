"""Where numbers come from: device, versions, threads, commit, date; and where they go."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "timm", "transformers", "numpy", "tokenpass")

# Several budgets of one model are compiled side by side: more than Dynamo allows by default before
# it silently runs the rest in eager mode.
RECOMPILATIONS = 64


def prepare(threads: int | None = None) -> None:
    """Set what every measurement relies on."""
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if threads is not None:
        torch.set_num_threads(threads)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment() -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": _device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }


def save(name: str, results: dict[str, Any]) -> Path:
    """Write results with their environment as ``results/<name>-<device>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device().type}.json"
    content = {"environment": environment(), **results}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit that is checked out; ``+`` if product code differs from it."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "tokenpass", "passes", "patterns")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _git(*args: str) -> str:
    done = subprocess.run(("git", *args), cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
