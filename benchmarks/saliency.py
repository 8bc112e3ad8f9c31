"""How far a pruned saliency map is from the unpruned one: 1369 tokens, a dense output.

``python -m benchmarks.saliency`` writes results/saliency-*.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console
from rich.progress import track

import tokenpass
from benchmarks.compiling import compiled, flops_share
from benchmarks.data import batches
from benchmarks.environment import prepare, save
from benchmarks.reference_models import dinov2_saliency
from benchmarks.tables import markdown
from tokenpass.methods import DEFAULT_KEEP

SIZE = 518
KEEPS = (0.5, DEFAULT_KEEP, 0.25)
METHODS = {"HiPrune + merge": "received", "random + merge": "random"}
BAR = 0.02
SEED = 0


@dataclass
class Row:
    """Mean absolute error of the maps of one variant, image by image."""

    method: str
    keep: float
    flops_share: float = 1.0
    errors: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        spread = statistics.stdev(self.errors) if len(self.errors) > 1 else math.nan
        return {
            "mean": statistics.mean(self.errors),
            "standard_error": spread / math.sqrt(len(self.errors)),
            "worst": max(self.errors),
        }


def measure(images: int, keeps: tuple[float, ...]) -> list[Row]:
    """Run every variant on the first ``images`` photographs."""
    model = dinov2_saliency()
    options = {"keep": keeps[0], "inner": "eager", "always_rewrite": True}
    pruned = {
        name: compiled(model, ranking=ranking, **options) for name, ranking in METHODS.items()
    }
    rows = {(name, keep): Row(name, keep) for name in METHODS for keep in keeps}
    with torch.inference_mode():
        for photo, _ in track(batches(SIZE, 1, images), "saliency", total=images):
            expected = model(photo)
            for (name, keep), row in rows.items():
                fast = pruned[name]
                torch.manual_seed(SEED + len(row.errors))
                if row.errors or keep != keeps[0]:
                    tokenpass.set_budget(fast, keep=keep)
                row.errors.append(float((fast(photo) - expected).abs().mean()))
                row.flops_share = flops_share(fast)
    return list(rows.values())


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        found = row.summary()
        error = f"{found['mean']:.4f} ± {found['standard_error']:.4f}"
        lines.append(
            (row.keep, row.method, f"{row.flops_share:.3f}", error, f"{found['worst']:.4f}")
        )
    return markdown(("keep", "method", "FLOPs", "mean absolute error", "worst image"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    prepare(arguments.threads)
    rows = measure(arguments.images, tuple(arguments.keeps))
    print(table(rows))
    path = save("saliency", {"bar": BAR, "rows": [asdict(row) | row.summary() for row in rows]})
    Console().print(f"written: {path.name}")


if __name__ == "__main__":
    main()
