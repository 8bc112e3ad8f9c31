"""Predicted time against measured time, for pruned encoders under Inductor.

``python -m benchmarks.predict`` writes results/predict-*.json. The machine is calibrated first.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import tokenpass
from benchmarks.compiling import calls, compiled
from benchmarks.environment import device
from benchmarks.plots import Plot
from benchmarks.reference_models import create
from benchmarks.suite import Case, Column, Suite, timed
from benchmarks.timing import interleaved

CASES = (
    ("vit_tiny_patch16_224", 224, 8),
    ("vit_small_patch16_224", 224, 8),
    ("vit_base_patch16_384", 384, 1),
)
"""Model, size of the image, batch."""

KEEPS = (1.0, 0.5, 0.25)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=[name for name, _, _ in CASES])
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))


def measure(wanted: argparse.Namespace) -> Iterator[Case]:
    machine = tokenpass.calibrate(device())
    constants = {
        "tera_flops_linear": round(1e-12 / machine.linear, 4),
        "tera_flops_attention": round(1e-12 / machine.attention, 4),
        "giga_bytes": round(1e-9 / machine.byte, 2),
    }
    for name, size, batch in CASES:
        if name not in wanted.models:
            continue
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = create(name, img_size=size).to(device())
        images = torch.randn(batch, 3, size, size, device=device())
        variants: dict[float, Any] = {keep: compiled(model, keep=keep) for keep in wanted.keeps}
        with torch.inference_mode():
            predicted = {
                keep: tokenpass.explain(
                    model, images, method=tokenpass.HiPrune(keep=keep)
                ).predicted_ms
                for keep in wanted.keeps
            }
            times = interleaved(calls(variants, images), wanted.rounds)
        rows = []
        for keep, found in times.items():
            row = {"keep": keep, "predicted_ms": predicted[keep], **timed(found)}
            row["off_by"] = round(abs((predicted[keep] or 0.0) / row["median_ms"] - 1), 4)
            rows.append(row)
        yield {"model": name, "size": size, "batch": batch, **constants}, rows


SUITE = Suite(
    name="predict",
    about="predicted against measured time",
    options=options,
    measure=measure,
    columns=(
        Column("model", "model"),
        Column("image", "size"),
        Column("batch", "batch"),
        Column("keep", "keep", "g"),
        Column("predicted, ms", "predicted_ms", ".1f"),
        Column("measured, ms", "median_ms", ".1f"),
        Column("IQR", "iqr_ms", ".1f"),
        Column("off by", "off_by", ".3f"),
    ),
    plot=Plot(
        x=("median_ms", "measured, ms"),
        y=("predicted_ms", "predicted, ms"),
        by=("model",),
        diagonal=True,
        log=True,
    ),
    rounds=7,
)

if __name__ == "__main__":
    SUITE.main()
