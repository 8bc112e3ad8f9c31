"""Time of the column means of the softmax, which rank tokens, beside that of a whole encoder.

``python -m benchmarks.score`` writes results/score-*.json. Two layers are scored by HiPrune.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.environment import device
from benchmarks.plots import Plot
from benchmarks.reference_models import vit_small
from benchmarks.suite import Case, Column, Suite, timed
from benchmarks.timing import interleaved
from tokenpass.kernels import attention_received

SIDES = (14, 28, 42, 64, 128)
"""Rows and columns of patches: 196 to 16,384 tokens."""

LARGEST_ENCODER = 64
"""Sides beyond this are scored alone."""

PATCH, HEADS, WIDTH = 16, 6, 64
LAYERS = 2
TOKENS_AT_ONCE = 1568
"""Short sequences are measured in batches: those of eight images of 14 x 14 patches."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))


def scores(batch: int, tokens: int) -> Callable[[], Any]:
    """Both layers; queries and keys lie in one tensor, as encoders have them."""
    joint = torch.randn(batch, tokens, 3, HEADS, WIDTH, device=device())
    query, key, _ = joint.permute(2, 0, 3, 1, 4)

    def call() -> Any:
        return [attention_received(query, key, WIDTH**-0.5, None, None) for _ in range(LAYERS)]

    return call


def measure(wanted: argparse.Namespace) -> Iterator[Case]:
    for side in wanted.sides:
        torch._dynamo.reset()
        batch = max(1, TOKENS_AT_ONCE // side**2)
        variants: dict[str, Callable[[], Any]] = {"scores": scores(batch, side**2 + 1)}
        if side <= LARGEST_ENCODER:
            size = side * PATCH
            images = torch.randn(batch, 3, size, size, device=device())
            encoder = torch.compile(vit_small(size=size).to(device()))
            variants["encoder"] = partial(encoder, images)
        with torch.inference_mode():
            times = interleaved(variants, wanted.rounds, warm_up=1)
        row = {"layers": LAYERS, **timed(times["scores"], times.get("encoder"))}
        if "encoder" in times:
            row["encoder_ms"] = round(1e3 * times["encoder"].median, 3)
        yield {"tokens": side**2, "batch": batch}, [row]


SUITE = Suite(
    name="score",
    about="time of ranking tokens, of that of a ViT-S",
    options=options,
    measure=measure,
    columns=(
        Column("tokens", "tokens"),
        Column("batch", "batch"),
        Column("column means of two layers, ms", "median_ms", ".1f"),
        Column("IQR", "iqr_ms", ".1f"),
        Column("encoder, ms", "encoder_ms", ".1f"),
        Column("share of it", "time_ratio", ".4f"),
    ),
    plot=Plot(("tokens", "tokens"), ("time_ratio", "two layers / encoder"), by=(), log=True),
    rounds=5,
)

if __name__ == "__main__":
    SUITE.main()
