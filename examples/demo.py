"""Prune a pretrained vision transformer on a photograph: ``make demo``.

The model is a DINOv2-S/14 with a saliency decoder; each pixel of its output says how much it
matters. At 518 x 518 it sees 1369 patch tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import cbook
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokenpass
from benchmarks.timing import Times, interleaved
from examples.picture import draw
from examples.saliency import MEAN, PATCH, STD, load
from tokenpass.cli.pictures import Picture, as_input, read

SAMPLE = "grace_hopper.jpg"
SIZE = 518
ROUNDS = 5
WIDTH = 100

console = Console(width=WIDTH)


@dataclass(frozen=True)
class Answers:
    """Saliency ``(H, W)`` with all tokens and with fewer, and which those are."""

    full: Tensor
    pruned: Tensor
    kept: Tensor

    @property
    def error(self) -> Tensor:
        return (self.full - self.pruned).abs()


def photograph(path: Path | None, size: int) -> Picture:
    """The middle square of a photograph, ``(size, size, 3)``, 0 to 1."""
    return read(path or Path(str(cbook.get_sample_data(SAMPLE, asfileobj=False))), size, size)


def answers(model: nn.Module, fast: Any, images: Tensor) -> Answers:
    full, pruned = (function(images)[0, 0].clone() for function in (model, fast))
    return Answers(full, pruned, tokenpass.kept(fast)[0])


def show(fast: Any, found: Answers, times: dict[str, Times]) -> None:
    """Print the answer before and after, the cost, and what was rewritten."""
    stats = tokenpass.stats(fast)
    tokens = [row.tokens_in for row in stats.blocks] + [stats.blocks[-1].tokens_out]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("saliency, mean value", f"{found.full.mean():.4f} -> {found.pruned.mean():.4f}")
    table.add_row(
        "mean absolute error", f"{found.error.mean():.4f} (worst pixel {found.error.max():.3f})"
    )
    table.add_row("patch tokens, block by block", " ".join(map(str, tokens)))
    table.add_row(
        "GFLOPs",
        f"{stats.flops_before / 1e9:.1f} -> {stats.flops / 1e9:.1f} "
        f"({stats.flops / stats.flops_before:.2f} of them)",
    )
    baseline = times["Inductor"]
    for name, measured in times.items():
        share = measured.median / baseline.median
        table.add_row(f"time, {name}", f"{1e3 * measured.median:.0f} ms ({share:.2f} of Inductor)")
    console.print(table, highlight=False)
    console.rule("report")
    print(tokenpass.report(fast))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, help=f"a photograph (default: matplotlib's {SAMPLE})")
    parser.add_argument("--size", type=int, default=SIZE, help=f"a multiple of {PATCH}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=Path("demo.png"))
    arguments = parser.parse_args()
    if arguments.size % PATCH:
        parser.error(f"--size {arguments.size} is no multiple of {PATCH}")

    model = load()
    photo = photograph(arguments.image, arguments.size)
    images = as_input(photo, MEAN, STD)
    fast = torch.compile(model, backend="tokenpass")
    inductor = torch.compile(model)
    with torch.inference_mode():
        with console.status("compiling with tokenpass"):
            found = answers(model, fast, images)
        with console.status("compiling with Inductor alone"):
            inductor(images)
        with console.status("timing"):
            times = interleaved(
                {
                    "eager": lambda: model(images),
                    "Inductor": lambda: inductor(images),
                    "tokenpass": lambda: fast(images),
                },
                arguments.rounds,
                warm_up=1,
            )
    show(fast, found, times)
    side = arguments.size // PATCH
    draw(arguments.output, photo, found.kept, (side, side), found.full, found.pruned)
    console.print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
