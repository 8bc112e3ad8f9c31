"""Wall time of a frame behind gates, steady state: ViT of width 384 and 12 blocks, batch 1.

``python -m benchmarks.gating`` writes results/gating-*.json. Which tokens changed does not matter
for the time, how many a gate lets through does; the frames are a random walk.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import tokenpass
from benchmarks.compiling import compiled, flops_share
from benchmarks.environment import device, prepare, save
from benchmarks.reference_models import vit_small
from benchmarks.tables import markdown
from benchmarks.timing import Times, interleaved

SIDES = (14, 28, 42)
"""Rows and columns of patches: 196, 784 and 1764 tokens."""

KEEPS = (0.25, 0.10)
PATCH = 16
FRAMES = 8
BASELINE = "Inductor"
SHARE_CHANGED = 0.1


@dataclass(frozen=True)
class Bar:
    """A speed-up over Inductor that is asked for, at a number of tokens and a budget.

    Attributes:
        of_flops: Whether it is a share of the FLOPs ratio.
    """

    tokens: int
    keep: float
    at_least: float
    of_flops: bool = False


BARS = (Bar(784, 0.25, 1.8), Bar(784, 0.10, 3.2), Bar(1764, 0.10, 0.75, of_flops=True))


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


def title(keep: float, attention: str) -> str:
    return f"keep {keep:g}, {attention}"


def in_turn(function: Any, frames: list[Tensor]) -> Callable[[], Any]:
    """Each call takes the next frame."""
    state = {"next": 0}

    def call() -> Any:
        state["next"] = (state["next"] + 1) % len(frames)
        return function(frames[state["next"]])

    return call


def measure(side: int, rounds: int) -> list[dict[str, Any]]:
    """All variants at one size."""
    torch._dynamo.reset()
    model, frames = vit_small(size=side * PATCH).to(device()), walk(side)
    options = {"method": "eventful", "scene_cut": None}
    variants: dict[str, Any] = {BASELINE: torch.compile(model)}
    for keep in KEEPS:
        for attention in ("exact", "none"):
            variants[title(keep, attention)] = compiled(
                model, keep=keep, attention=attention, **options
            )
    with torch.inference_mode():
        calls = {name: in_turn(function, frames) for name, function in variants.items()}
        times = interleaved(calls, rounds, warm_up=3)
        shares = {n: flops_share(fast) for n, fast in variants.items() if n != BASELINE}
    memory = {n: tokenpass.stats(fast).state_bytes for n, fast in variants.items() if n in shares}
    return [_row(side**2, name, times, shares, memory) for name in times]


def _row(
    tokens: int,
    name: str,
    times: dict[str, Times],
    shares: dict[str, float],
    memory: dict[str, int],
) -> dict[str, Any]:
    ratio = times[name].ratio_to(times[BASELINE])
    return {
        "tokens": tokens,
        "variant": name,
        "median_ms": 1e3 * times[name].median,
        "iqr_ms": 1e3 * times[name].spread,
        "speed_up": 1 / ratio,
        "flops_ratio": 1 / shares.get(name, 1.0),
        "state_mb": memory.get(name, 0) / 1e6,
    }


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured beside what is asked for."""
    found = {(row["tokens"], row["variant"]): row for row in rows}
    lines = []
    for bar in BARS:
        row = found.get((bar.tokens, title(bar.keep, "exact")))
        if row is not None:
            wanted = bar.at_least * (row["flops_ratio"] if bar.of_flops else 1.0)
            lines.append(
                {"tokens": bar.tokens, "keep": bar.keep, "speed_up": row["speed_up"], "bar": wanted}
            )
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    titles = ("tokens", "variant", "ms ± half IQR", "speed-up", "FLOPs ratio", "state MB")
    lines = [
        (
            str(row["tokens"]),
            row["variant"],
            f"{row['median_ms']:.1f} ± {row['iqr_ms'] / 2:.1f}",
            f"{row['speed_up']:.2f}",
            f"{row['flops_ratio']:.2f}",
            f"{row['state_mb']:.0f}",
        )
        for row in rows
    ]
    return markdown(titles, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    arguments = parser.parse_args()
    prepare(arguments.threads)
    rows = [row for side in arguments.sides for row in measure(side, arguments.rounds)]
    results = {"rows": rows, "verdict": verdict(rows)}
    print(table(rows))
    for line in results["verdict"]:
        print(
            f"{line['tokens']} tokens, keep {line['keep']}: {line['speed_up']:.2f} "
            f"(at least {line['bar']:.2f})"
        )
    Console().print(f"written: {save('gating', results).name}")


if __name__ == "__main__":
    main()
