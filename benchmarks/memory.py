"""Peak memory of computing scores on a long sequence, and what a gated stream keeps.

``python -m benchmarks.memory`` writes results/memory-*.json. On a CPU the peak is that of the whole
process, so scores come first: what was large before them would hide them.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import tokenpass
from benchmarks.compiling import compiled
from benchmarks.environment import device
from benchmarks.gating import BLOCKS, PATCH, UNIT_BYTES, walk
from benchmarks.gating import WIDTH as CHANNELS
from benchmarks.reference_models import vit_small
from benchmarks.suite import Case, Column, Row, Suite
from benchmarks.timing import once
from tokenpass.kernels import attention_received

TOKENS, HEADS, WIDTH = 16_384, 12, 64
WARM_UP_TOKENS = 256
MEGABYTE = 10**6
SIDES = (14, 28, 42)
"""Rows and columns of patches of the gated encoders."""

PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


def scores(query: Tensor, key: Tensor) -> Tensor:
    found: Tensor = attention_received(query, key, WIDTH**-0.5, None, None)
    return found


def resident_bytes() -> int:
    """Memory of the process now; its peak where the system does not say."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_bytes()
    return int(status.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most memory that the process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT


def of_scores(tokens: int) -> Row:
    """An upper bound on a CPU: a peak that came earlier counts too."""
    where = device()
    small = torch.randn(1, HEADS, WARM_UP_TOKENS, WIDTH, device=where)
    scores(small, small)
    query, key = (torch.randn(1, HEADS, tokens, WIDTH, device=where) for _ in range(2))
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = once(lambda: scores(query, key))
        extra = torch.cuda.max_memory_allocated() - before
    else:
        before = resident_bytes()
        seconds = once(lambda: scores(query, key))
        extra = max(0, peak_bytes() - before)
    return {
        "extra_mb": round(extra / MEGABYTE, 2),
        "one_map_mb": 4 * tokens * tokens / MEGABYTE,
        "seconds": round(seconds, 3),
    }


def of_stream(side: int, attention: str) -> Row:
    """What gates, buffers and running attention of one stream take."""
    torch._dynamo.reset()
    model = vit_small(size=side * PATCH, depth=BLOCKS).to(device())
    fast = compiled(
        model, method="eventful", keep=0.25, attention=attention, scene_cut=None, inner="eager"
    )
    with torch.inference_mode():
        for frame in walk(side)[:2]:
            fast(frame)
    state = tokenpass.stats(fast).state_bytes
    unit = UNIT_BYTES * side**2 * CHANNELS * BLOCKS
    return {"extra_mb": round(state / MEGABYTE, 2), "units": round(state / unit, 3)}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--sides", type=int, nargs="*", default=list(SIDES))


def measure(wanted: argparse.Namespace) -> Iterator[Case]:
    yield {"what": f"scores, {HEADS} heads", "tokens": wanted.tokens}, [of_scores(wanted.tokens)]
    for side in wanted.sides:
        for attention in ("exact", "none"):
            case = {"what": f"a gated stream, {attention}", "tokens": side**2}
            yield case, [of_stream(side, attention)]


SUITE = Suite(
    name="memory",
    about="memory of scores, and of a gated stream",
    options=options,
    measure=measure,
    columns=(
        Column("of", "what"),
        Column("tokens", "tokens"),
        Column("MB", "extra_mb", ".0f"),
        Column("a map of one head, MB", "one_map_mb", ".0f"),
        Column("in N x C x blocks floats", "units", ".2f"),
    ),
)

if __name__ == "__main__":
    SUITE.main()
