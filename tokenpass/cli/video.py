"""``tokenpass video``: which tokens of a video are updated, and what a frame costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont

import tokenpass
from tokenpass import plot
from tokenpass.cli import choice
from tokenpass.cli.clips import frame_count, frame_rate, pictures, writing
from tokenpass.cli.explain import planned
from tokenpass.cli.models import Loaded, load
from tokenpass.cli.pictures import Picture, Pixels, input_of, size_of, to_pixels
from tokenpass.cli.screen import InputError, print_json, results, say, track, whole_file, working
from tokenpass.methods import Eventful
from tokenpass.options import parse_options
from tokenpass.timing import once

LEAST_WIDTH = 448
"""Pixels; smaller frames are enlarged so that the strip can be read."""
STRIP = 48
"""Pixels below a frame, for the numbers."""
HISTORY = 120
"""Frames whose times the strip shows."""
INK, BAR, TIME = (230, 230, 230), (230, 159, 0), (86, 180, 233)
FRAMES_OF_A_CAMERA = 300


class Budget:
    """What passes the gates: a fixed share, or one that is steered to hold a time."""

    def __init__(self, method: Eventful, target_ms: float | None) -> None:
        self.method = method
        self.target = None if target_ms is None else tokenpass.LatencyTarget(target_ms)

    @property
    def now(self) -> float:
        """Of the next frame; nan where only a threshold is given."""
        keep = self.method.keep if self.target is None else self.target.keep
        return math.nan if keep is None else float(keep)


@dataclass
class Watched:
    """What was seen, frame by frame.

    Attributes:
        stats: After each frame.
        milliseconds: Of each frame.
        keeps: The budget of each frame.
    """

    stats: list[tokenpass.Stats] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    keeps: list[float] = field(default_factory=list)


def command(
    model: choice.Model,
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="A file, or a camera's number.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The MP4 to write.")] = Path("out.mp4"),
    keep: choice.Keep = None,
    target_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="Steer the budget to hold this time.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=2, help="Frames at most.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the frames' numbers here too.")] = None,
    input: choice.Input = None,
    set: choice.Set = None,
    weights: choice.Weights = "pretrained",
    as_json: choice.Json = False,
) -> int:
    """Draw the tokens that gates update on a video, with budget and time of each frame."""
    if keep is not None and target_ms is not None:
        raise InputError(f"--keep {keep} and --target-ms {target_ms:g}: pass one of them")
    options = choice.options("eventful", keep, set)
    settings = parse_options(options)
    method = settings.method
    if not isinstance(method, Eventful):
        raise InputError("video needs --set method=eventful, which is the default")
    limit = frames or (FRAMES_OF_A_CAMERA if video.isdigit() else None)
    count, rate = frame_count(video), frame_rate(video)
    total = min(n for n in (count, limit, math.inf) if n is not None)
    with working(f"loading {model}"):
        loaded = load(model, input, weights).check().one_by_one()
    size = size_of(loaded)
    with working("planning"):
        report = planned(loaded, method)
    if not report.converted and not settings.always_rewrite:
        reasons = "; ".join(dict.fromkeys(item.reason for item in report.refusals))
        raise InputError(f"{model} is left as it is: {reasons}")
    if loaded.random:
        say("random weights: the tokens mean nothing")
    if len(report.grid) != 2:
        raise InputError(f"{model}: its tokens form no grid in two dimensions")
    rows, columns = report.grid
    fast = torch.compile(loaded.model, backend="tokenpass", options=options)
    budget = Budget(method, target_ms)
    found, source = Watched(), pictures(video, limit, size=size)
    with whole_file(out) as file, writing(file, rate) as writer, torch.inference_mode():
        expected = None if math.isinf(total) else int(total)
        frames_seen = watched(source, loaded, fast, budget, found)
        for picture in track(frames_seen, "frames", expected):
            writer.write(drawn(picture, (rows, columns), found))
        if len(found.stats) < 2:
            raise InputError(f"{video} has no two frames")
    if figure is not None:
        with whole_file(figure) as file:
            plot.timeline(found.stats, found.milliseconds).savefig(file)
    summary = summarised(found)
    if as_json:
        print_json({"model": model, "video": video, "out": str(out), **summary})
    else:
        results().print(sentence(summary), soft_wrap=True)
        say(f"written: {out}")
    return 0


def watched(
    frames: Iterable[Pixels], loaded: Loaded, fast: Any, budget: Budget, found: Watched
) -> Iterator[Picture]:
    """Run a model on each frame, note what happened, and pass the frame on, 0 to 1.

    What is compiled on the first frame is forgotten again, so that its time is that of a frame.
    """
    for pixels in frames:
        picture = pixels.astype(np.float32) / np.float32(255)
        given = input_of(loaded, picture)
        if not found.stats:
            for _ in range(2):
                loaded.call(fast, given)
            tokenpass.reset(fast)
        run = fast if budget.target is None else partial(budget.target.run, fast)
        found.keeps.append(budget.now)
        found.milliseconds.append(1e3 * once(partial(loaded.call, run, given)))
        found.stats.append(tokenpass.stats(fast))
        yield picture


def drawn(picture: Picture, grid: tuple[int, int], found: Watched) -> Pixels:
    """The last frame: updated tokens in colour, below them the numbers; both sides are even."""
    stats = found.stats[-1]
    share = plot.updated_share(list(stats.selected), grid)
    frame = Image.fromarray(to_pixels(plot.updated(picture, share)))
    factor = -(-LEAST_WIDTH // frame.width)
    width, height = factor * frame.width // 2 * 2, factor * frame.height // 2 * 2
    canvas = Image.new("RGB", (width, height + STRIP))
    canvas.paste(frame.resize((width, height), Image.Resampling.BILINEAR), (0, 0))
    _strip(ImageDraw.Draw(canvas), width, height, float(share.mean()), found)
    return np.asarray(canvas)


def _strip(draw: ImageDraw.ImageDraw, width: int, top: int, share: float, found: Watched) -> None:
    """Budget and updated share as words and a bar on the left, recent times on the right."""
    font = ImageFont.load_default(size=13)
    middle, pad = 3 * width // 5, 6
    keep = found.keeps[-1]
    budget = "" if math.isnan(keep) else f"keep {keep:.2f}   "
    words = f"{budget}updated {share:.0%}   {found.milliseconds[-1]:.0f} ms"
    draw.text((pad, top + pad), words, INK, font)
    low, high = top + STRIP - pad, top + STRIP - 18
    right = middle - 2 * pad
    draw.rectangle((pad, high, right, low), outline=INK)
    draw.rectangle((pad, high, pad + share * (right - pad), low), fill=BAR)
    recent = found.milliseconds[-HISTORY:]
    step, tallest = (width - pad - middle) / HISTORY, max(recent)
    for place, value in enumerate(recent):
        left = middle + place * step
        bar = (left, low - value / tallest * (STRIP - 2 * pad), left + max(step - 1, 1), low)
        draw.rectangle(bar, fill=TIME)


def summarised(found: Watched) -> dict[str, Any]:
    """All frames in a few numbers; what follows the first is told apart."""
    kept = [n for n, stats in enumerate(found.stats) if not stats.computed_in_full]
    rates = [mean(found.stats[n].update_rates) for n in kept]
    shares = [found.stats[n].flops / found.stats[n].flops_before for n in kept]
    return {
        "frames": len(found.stats),
        "in_full": len(found.stats) - len(kept),
        "first_ms": found.milliseconds[0],
        "updated": mean(rates) if kept else None,
        "of_flops": mean(shares) if kept else None,
        "ms": median(found.milliseconds[n] for n in kept) if kept else None,
        "keeps": found.keeps,
        "milliseconds": found.milliseconds,
    }


def sentence(summary: dict[str, Any]) -> str:
    """The same for people."""
    begin = f"{summary['frames']} frames, {summary['in_full']} computed in full"
    if summary["ms"] is None:
        return begin
    return (
        f"{begin} ({summary['first_ms']:.1f} ms the first). Of the others: "
        f"{summary['updated']:.0%} of the tokens updated, {summary['of_flops']:.2f} of the FLOPs, "
        f"{summary['ms']:.1f} ms a frame."
    )
