"""How time grows with tokens, depth and streams: ViT-S, batch 1.

``python -m benchmarks.scale`` writes results/scale-*.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import tokenpass
from benchmarks.compiling import calls, compiled
from benchmarks.environment import device
from benchmarks.gating import PATCH, walk
from benchmarks.plots import Plot
from benchmarks.reference_models import vit_small
from benchmarks.suite import Case, Column, Row, Suite, timed
from benchmarks.timing import Call, interleaved

SIDES, DEPTHS, STREAMS = (14, 20, 28), (6, 12, 24), (1, 2, 4, 8)
KEEP, GATED_KEEP = 0.5, 0.1
SIDE, DEPTH = 14, 12
"""Of the model that the other axes are measured on."""

BASELINE = "Inductor"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sides", type=int, nargs="*", default=list(SIDES))
    parser.add_argument("--depths", type=int, nargs="*", default=list(DEPTHS))
    parser.add_argument("--streams", type=int, nargs="*", default=list(STREAMS))


def pruned(side: int, depth: int, rounds: int) -> list[Row]:
    """Plain Inductor and pruning at one size."""
    torch._dynamo.reset()
    model = vit_small(depth, side * PATCH).to(device())
    images = torch.randn(1, 3, side * PATCH, side * PATCH, device=device())
    variants = {BASELINE: torch.compile(model), f"keep {KEEP}": compiled(model, keep=KEEP)}
    with torch.inference_mode():
        times = interleaved(calls(variants, images), rounds)
    return [{"variant": name, **timed(t, times[BASELINE])} for name, t in times.items()]


def streams(counts: list[int], rounds: int) -> Iterator[Case]:
    """A frame of each of several streams in turn, over their number."""
    torch._dynamo.reset()
    fast = compiled(
        vit_small(DEPTH, SIDE * PATCH).to(device()),
        method="eventful",
        keep=GATED_KEEP,
        scene_cut=None,
        max_streams=max(counts),
    )
    frames = walk(SIDE)
    for count in counts:
        with torch.inference_mode():
            times = interleaved({"all": _all_streams(fast, frames, count)}, rounds)["all"]
        row = timed(times)
        row = {field: row[field] / count for field in ("median_ms", "iqr_ms")}
        state = tokenpass.stats(fast).state_bytes / 1e6
        yield (
            {"against": "streams", "at": count},
            [{"variant": f"gated, keep {GATED_KEEP}", **row, "state_mb": state}],
        )


def _all_streams(fast: Any, frames: list[Any], count: int) -> Call:
    state = {"frame": 0}

    def call() -> None:
        state["frame"] = (state["frame"] + 1) % len(frames)
        for number in range(count):
            with tokenpass.stream(fast, f"camera-{number}"):
                fast(frames[state["frame"]])

    return call


def measure(wanted: argparse.Namespace) -> Iterator[Case]:
    for side in wanted.sides:
        yield {"against": "tokens", "at": side**2}, pruned(side, DEPTH, wanted.rounds)
    for depth in wanted.depths:
        yield {"against": "blocks", "at": depth}, pruned(SIDE, depth, wanted.rounds)
    if wanted.streams:
        yield from streams(wanted.streams, wanted.rounds)


SUITE = Suite(
    name="scale",
    about="time against tokens, depth and streams",
    options=options,
    measure=measure,
    columns=(
        Column("against", "against"),
        Column("", "at"),
        Column("variant", "variant"),
        Column("ms a frame", "median_ms", ".1f"),
        Column("IQR", "iqr_ms", ".1f"),
        Column("time / Inductor", "time_ratio", ".3f"),
        Column("state, MB", "state_mb", ".0f"),
    ),
    plot=Plot(("at", "number"), ("median_ms", "ms"), by=("against", "variant"), log=True),
    rounds=7,
)

if __name__ == "__main__":
    SUITE.main()
