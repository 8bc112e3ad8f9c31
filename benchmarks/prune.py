"""Wall time of pruned encoders: eager, Inductor, tokenpass at several budgets, and peers.

``python -m benchmarks.prune`` writes results/prune-*.json. Peers are our own reading of ToMe, and
tokenpass with a random choice of tokens, which costs no scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compiling import calls, compiled, flops_share
from benchmarks.environment import device
from benchmarks.plots import Plot
from benchmarks.reference_models import create
from benchmarks.suite import Case, Column, Row, Suite, timed
from benchmarks.timing import interleaved
from benchmarks.tome import ToMe, count_flops
from tokenpass.methods import DEFAULT_KEEP

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
KEEPS = tuple(sorted({1.0, 0.7, 0.5, DEFAULT_KEEP, 0.25}, reverse=True))
BASELINE = "Inductor"
PEER_KEEP = 0.5
MERGED = (8, 13)
"""``r`` of ToMe: at 196 tokens and 12 blocks about what keep 0.5 and 0.25 leave of the FLOPs."""

Key = tuple[str, float | None]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of timm")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="of the image")
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--random", type=float, nargs="*", default=[PEER_KEEP], help="its keeps")
    parser.add_argument("--tome", type=int, nargs="*", default=list(MERGED), help="its r")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))


def variants(model: nn.Module, wanted: argparse.Namespace) -> dict[Key, Any]:
    """All of them, by name and budget."""
    found: dict[Key, Any] = {("eager", None): model, (BASELINE, None): torch.compile(model)}
    for keep in wanted.keeps:
        found["tokenpass", keep] = compiled(model, keep=keep)
    for keep in wanted.random:
        found["random", keep] = compiled(model, keep=keep, ranking="random")
    for merged in wanted.tome:
        found["ToMe", merged] = torch.compile(ToMe(model, merged))
    return found


def flops_ratios(found: dict[Key, Any], model: nn.Module, images: Tensor) -> dict[Key, float]:
    """FLOPs over those of the unpruned model."""
    ratios: dict[Key, float] = {}
    for (name, budget), function in found.items():
        ratio = 1.0
        if name == "ToMe":
            ratio = count_flops(ToMe(model, int(budget or 0)), images) / count_flops(model, images)
        elif name in ("tokenpass", "random") and budget != 1.0:
            ratio = flops_share(function)
        ratios[name, budget] = ratio
    return ratios


def rows(model: nn.Module, images: Tensor, wanted: argparse.Namespace) -> list[Row]:
    """All variants of one model at one batch."""
    torch._dynamo.reset()
    found = variants(model, wanted)
    with torch.inference_mode():
        times = interleaved(calls(found, images), wanted.rounds)
        flops = flops_ratios(found, model, images)
    lines = []
    for key, measured in times.items():
        row = timed(measured, times[BASELINE, None])
        row |= {"variant": key[0], "budget": key[1], "flops_ratio": round(flops[key], 4)}
        row["time_over_flops"] = round(row["time_ratio"] / flops[key], 4)
        lines.append(row)
    return lines


def measure(wanted: argparse.Namespace) -> Iterator[Case]:
    dtype = getattr(torch, wanted.dtype)
    for name in wanted.models:
        for size in wanted.sizes:
            torch.manual_seed(0)
            model = create(name, img_size=size).to(device(), dtype)
            for batch in wanted.batches:
                images = torch.randn(batch, 3, size, size, device=device(), dtype=dtype)
                case = {"model": name, "size": size, "batch": batch, "dtype": wanted.dtype}
                yield case, rows(model, images, wanted)


SUITE = Suite(
    name="prune",
    about="time of pruned encoders against plain Inductor",
    options=options,
    measure=measure,
    columns=(
        Column("model", "model"),
        Column("image", "size"),
        Column("batch", "batch"),
        Column("variant", "variant"),
        Column("keep or r", "budget", "g"),
        Column("ms", "median_ms", ".1f"),
        Column("IQR", "iqr_ms", ".1f"),
        Column("time / Inductor", "time_ratio", ".3f"),
        Column("FLOPs", "flops_ratio", ".3f"),
        Column("time / FLOPs", "time_over_flops", ".3f"),
    ),
    plot=Plot(
        x=("flops_ratio", "FLOPs / those of the unpruned encoder"),
        y=("time_ratio", "time / Inductor's"),
        by=("model", "size", "batch", "variant"),
        diagonal=True,
    ),
)

if __name__ == "__main__":
    SUITE.main()
