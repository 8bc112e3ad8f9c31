"""How far gated video is from the dense model, and what a frame costs: DINOv2-S/14 on real clips.

``python -m benchmarks.video`` writes results/video-*.json. The encoder is what is compiled; tokens
of all variants go to the same saliency decoder.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import tokenpass
from benchmarks.clips import HEIGHT, WIDTH, clips, frames, successive
from benchmarks.compiling import compiled, flops_share
from benchmarks.data import DataMissingError
from benchmarks.environment import prepare, save
from benchmarks.reference_models import dinov2_saliency
from benchmarks.timing import interleaved
from examples.saliency import PATCH, Saliency

KEEPS = (1.0, 0.5, 0.25, 0.1, 0.05)
RANKINGS = {"eventful": "change", "random": "random"}
START, FRAMES = 0, 60
"""Later parts of the clips are harder: ``--start 140`` has a file of its own."""
ROUNDS, WARM_UP = 21, 3
BASELINE = "Inductor"
BARRED_KEEP = 0.25
SEED = 0
PRINTED_COLUMNS = 100


@dataclass
class Row:
    """One variant on one clip, frame by frame, the first frame (always exact) left out.

    Attributes:
        similarity: Cosine with the dense tokens, mean over the tokens.
        error: Mean absolute difference of the saliency maps.
        flops: Share of the dense encoder's.
    """

    clip: str
    method: str
    keep: float
    similarity: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        return {
            "mean_similarity": statistics.mean(self.similarity),
            "worst_similarity": min(self.similarity),
            "mean_error": statistics.mean(self.error),
            "flops_share": statistics.mean(self.flops),
        }


@dataclass(frozen=True)
class Timed:
    """Milliseconds of a frame of one clip; ``ratio`` is to Inductor in the same rounds."""

    clip: str
    variant: str
    median_ms: float
    iqr_ms: float
    ratio: float


# ---------------------------------------------------------------- agreement


def saliency_of(model: Saliency, tokens: Tensor) -> Tensor:
    """Tokens ``(1, 1 + N, 384)``, the class token first, to a map ``(1, 1, H, W)``."""
    grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (HEIGHT // PATCH, WIDTH // PATCH))
    size = (HEIGHT, WIDTH)
    logits = functional.interpolate(model.head(grid), size, mode="bilinear", align_corners=False)
    return logits.sigmoid()


def gated(encoder: nn.Module, keeps: Iterable[float]) -> dict[tuple[str, float], Any]:
    """The encoder with gates, for each way of ranking tokens and each budget."""
    options = {"method": "eventful", "inner": "eager", "always_rewrite": True}
    return {
        (name, keep): compiled(encoder, keep=keep, ranking=ranking, **options)
        for name, ranking in RANKINGS.items()
        for keep in keeps
    }


def compare(model: Saliency, clip: str, video: list[Tensor], variants: dict[Any, Any]) -> list[Row]:
    """Run all variants and the dense encoder through a clip, one frame of each at a time."""
    rows = {key: Row(clip, *key) for key in variants}
    torch.manual_seed(SEED)
    for index, frame in enumerate(track(video, clip)):
        tokens = model.vit(frame)
        expected = saliency_of(model, tokens)
        for key, fast in variants.items():
            found, row = fast(frame), rows[key]
            if index == 0:
                continue
            row.similarity.append(float(functional.cosine_similarity(found, tokens, -1).mean()))
            row.error.append(float((saliency_of(model, found) - expected).abs().mean()))
            row.flops.append(flops_share(fast))
    for fast in variants.values():
        tokenpass.reset(fast)
    return list(rows.values())


# ---------------------------------------------------------------- time


def title(keep: float) -> str:
    return f"keep {keep:g}"


def timed_variants(encoder: nn.Module, keeps: Iterable[float]) -> dict[str, Any]:
    """As a user gets them: under Inductor, with the cost model's veto."""
    fast = {title(keep): compiled(encoder, method="eventful", keep=keep) for keep in keeps}
    return {"eager": encoder, BASELINE: torch.compile(encoder), **fast}


def measure_times(
    clip: str, video: Sequence[Tensor], functions: dict[str, Any], rounds: int
) -> list[Timed]:
    calls = {name: successive(function, video) for name, function in functions.items()}
    times = interleaved(calls, rounds, WARM_UP)
    baseline = times[BASELINE]
    return [
        Timed(clip, name, 1e3 * found.median, 1e3 * found.spread, found.ratio_to(baseline))
        for name, found in times.items()
    ]


# ---------------------------------------------------------------- results


def verdict(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """What was measured at the budget that has bars, beside what is allowed."""
    found = [row.summary() for row in rows if (row.method, row.keep) == ("eventful", BARRED_KEEP)]
    if not found:
        return {}
    similarity = [row["mean_similarity"] for row in found]
    return {
        "similarity, worst clip, at least": {"measured": min(similarity), "allowed": 0.98},
        "similarity, mean of clips, at least": {
            "measured": statistics.mean(similarity),
            "allowed": 0.99,
        },
        "saliency error, worst clip, at most": {
            "measured": max(row["mean_error"] for row in found),
            "allowed": 0.03,
        },
    }


def clip_table(clip: str, rows: Iterable[Row], times: Iterable[Timed]) -> Table:
    """One line for each budget, random selection beside the method, then the dense encoder."""
    by_key = {(row.method, row.keep): row.summary() for row in rows if row.clip == clip}
    timed = {found.variant: found for found in times if found.clip == clip}
    drawn = _table(
        clip, "keep", "FLOPs", "cosine", "random", "map error", "random", "ms", "/ Inductor"
    )
    for keep in [keep for method, keep in by_key if method == "eventful"]:
        mine, other = by_key["eventful", keep], by_key["random", keep]
        drawn.add_row(
            f"{keep:g}",
            f"{mine['flops_share']:.3f}",
            *(f"{found['mean_similarity']:.4f}" for found in (mine, other)),
            *(f"{found['mean_error']:.4f}" for found in (mine, other)),
            *_time_cells(timed.get(title(keep))),
        )
    for name in ("eager", BASELINE):
        if name in timed:
            drawn.add_row(name, "1.000", *"----", *_time_cells(timed[name]))
    return drawn


def overview(rows: Sequence[Row], times: Sequence[Timed]) -> Table:
    """Over all clips: means, and the clip that is worst."""
    drawn = _table(
        "all clips", "keep", "method", "FLOPs", "cosine", "worst", "map error", "worst", "time"
    )
    for method, keep in dict.fromkeys((row.method, row.keep) for row in rows):
        found = [row.summary() for row in rows if (row.method, row.keep) == (method, keep)]
        cosine = [row["mean_similarity"] for row in found]
        error = [row["mean_error"] for row in found]
        ratios = [one.ratio for one in times if one.variant == title(keep)]
        drawn.add_row(
            f"{keep:g}",
            method,
            f"{statistics.mean(row['flops_share'] for row in found):.3f}",
            *(f"{value:.4f}" for value in (statistics.mean(cosine), min(cosine))),
            *(f"{value:.4f}" for value in (statistics.mean(error), max(error))),
            f"{statistics.mean(ratios):.2f}" if ratios and method == "eventful" else "-",
        )
    return drawn


def _table(name: str, *columns: str) -> Table:
    drawn = Table(box=box.MARKDOWN, title=name)
    for column in columns:
        drawn.add_column(column, justify="right")
    return drawn


def _time_cells(found: Timed | None) -> tuple[str, str]:
    return ("-", "-") if found is None else (f"{found.median_ms:.0f}", f"{found.ratio:.2f}")


def load(path: Path, limit: int, start: int) -> list[Tensor]:
    """Frames ``(1, 3, 252, 448)`` of a clip.

    Raises:
        DataMissingError: If there are fewer than two.
    """
    video = list(frames(path, limit, start))
    if len(video) < 2:
        raise DataMissingError(f"{path.name} has no two frames from {start}: choose another start")
    return video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", nargs="+", choices=sorted(clips()), help="default: all")
    parser.add_argument("--start", type=int, default=START, help="first frame of each clip")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare(arguments.threads)
    model = dinov2_saliency()
    paths = {name: path for name, path in clips().items() if name in (arguments.clips or clips())}
    videos = {name: load(p, arguments.frames, arguments.start) for name, p in paths.items()}
    rows: list[Row] = []
    times: list[Timed] = []
    with torch.no_grad():
        variants = gated(model.vit, arguments.keeps)
        for clip, video in videos.items():
            rows += compare(model, clip, video, variants)
        functions = timed_variants(model.vit, arguments.keeps) if arguments.rounds else {}
        for clip, video in videos.items() if functions else ():
            times += measure_times(clip, video, functions, arguments.rounds)
    console = Console(width=PRINTED_COLUMNS)
    for clip in videos:
        console.print(clip_table(clip, rows, times))
    console.print(overview(rows, times))
    bars = verdict(rows)
    for name, found in bars.items():
        console.print(f"{name} {found['allowed']:g}: {found['measured']:.4f}", highlight=False)
    results = {
        "start": arguments.start,
        "frames": arguments.frames,
        "rows": [asdict(row) | row.summary() for row in rows],
        "times": [asdict(found) for found in times],
        "verdict": bars,
    }
    name = f"video-{arguments.start}" if arguments.start else "video"
    console.print(f"written: {save(name, results).name}")


if __name__ == "__main__":
    main()
