"""Wall time of a frame behind gates, steady state: ViT of width 384 and 12 blocks, batch 1.

``python -m benchmarks.gating`` writes results/gate-*.json. Which tokens changed does not matter for
the time at a fixed budget, how many a gate lets through does: the frames are a random walk, or a
real clip.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

import tokenpass
from benchmarks.compiling import compiled, flops_share
from benchmarks.environment import device
from benchmarks.plots import Plot
from benchmarks.reference_models import vit_small
from benchmarks.suite import Case, Column, Row, Suite, timed
from benchmarks.timing import Times, interleaved

SIDES = (14, 28, 42, 64)
"""Rows and columns of patches: 196, 784, 1764 and 4096 tokens."""

KEEPS = (1.0, 0.5, 0.25, 0.10, 0.05)
PATCH, WIDTH, BLOCKS = 16, 384, 12
FRAMES = 8
BASELINE = "Inductor"
SHARE_CHANGED = 0.1
UNIT_BYTES = 4
"""Of one channel of one token."""

Key = tuple[str, float | None]
"""Attention and budget; the baseline has no budget."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--attention", nargs="+", default=["exact", "none"])
    parser.add_argument("--clip", help="of the data folder, instead of a random walk")


def walk(side: int) -> list[Tensor]:
    """Frames ``(1, 3, H, W)`` of which a tenth of the patches change from one to the next."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, side * PATCH, side * PATCH, generator=generator)
    frames = []
    for _ in range(FRAMES):
        cells = torch.rand(1, 1, side, side, generator=generator) < SHARE_CHANGED
        mask = cells.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        x = x + 0.3 * torch.randn(x.shape, generator=generator) * mask
        frames.append(x.to(device()))
    return frames


def video(name: str, side: int) -> list[Tensor]:
    """The first frames of a clip, and back again."""
    from benchmarks import clips  # decoding needs a library that nothing else here does

    size = (side * PATCH, side * PATCH)
    pictures = clips.pictures(clips.clips()[name], FRAMES, size=size)
    frames = [clips.normalised(picture).to(device()) for picture in pictures]
    return [*frames, *frames[-2:0:-1]]


def in_turn(function: Any, frames: list[Tensor]) -> Callable[[], Any]:
    """Each call takes the next frame."""
    endless = cycle(frames)
    return lambda: function(next(endless))


def rows(side: int, wanted: argparse.Namespace) -> list[Row]:
    """All variants at one size."""
    torch._dynamo.reset()
    frames = video(wanted.clip, side) if wanted.clip else walk(side)
    model = vit_small(size=side * PATCH).to(device())
    variants: dict[Key, Any] = {(BASELINE, None): torch.compile(model)}
    for keep in wanted.keeps:
        for attention in wanted.attention:
            variants[attention, keep] = compiled(
                model, keep=keep, attention=attention, method="eventful", scene_cut=None
            )
    with torch.inference_mode():
        calls = {key: in_turn(function, frames) for key, function in variants.items()}
        times = interleaved(calls, wanted.rounds, warm_up=3)
    baseline = times[BASELINE, None]
    return [_row(side**2, key, variants[key], times[key], baseline) for key in times]


def _row(tokens: int, key: Key, function: Any, times: Times, baseline: Times) -> Row:
    attention, keep = key
    row = {"variant": attention, "keep": keep, **timed(times, baseline)}
    share, state = 1.0, 0
    if keep is not None and tokenpass.report(function).converted:
        share, state = flops_share(function), tokenpass.stats(function).state_bytes
    speed_up = 1 / row["time_ratio"]
    unit = UNIT_BYTES * tokens * WIDTH * BLOCKS
    return row | {
        "speed_up": round(speed_up, 4),
        "flops_ratio": round(1 / share, 4),
        "speed_up_over_flops": round(speed_up * share, 4),
        "state_mb": round(state / 1e6, 3),
        "state_units": round(state / unit, 3),
    }


def measure(wanted: argparse.Namespace) -> Iterator[Case]:
    for side in wanted.sides:
        case = {"tokens": side**2, "frames": wanted.clip or "random walk"}
        yield case, rows(side, wanted)


SUITE = Suite(
    name="gate",
    about="time of a frame behind gates against plain Inductor",
    options=options,
    measure=measure,
    columns=(
        Column("tokens", "tokens"),
        Column("frames", "frames"),
        Column("attention", "variant"),
        Column("keep", "keep", "g"),
        Column("ms", "median_ms", ".1f"),
        Column("IQR", "iqr_ms", ".1f"),
        Column("speed-up", "speed_up", ".2f"),
        Column("FLOPs saved, times", "flops_ratio", ".2f"),
        Column("speed-up / FLOPs", "speed_up_over_flops", ".2f"),
        Column("state, MB", "state_mb", ".0f"),
    ),
    plot=Plot(
        x=("flops_ratio", "FLOPs of a dense frame / of a gated one"),
        y=("speed_up", "speed-up over Inductor"),
        by=("tokens", "variant"),
        diagonal=True,
        only={"frames": "random walk"},
    ),
)

if __name__ == "__main__":
    SUITE.main()
