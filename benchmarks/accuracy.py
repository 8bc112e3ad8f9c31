"""What pruning costs in accuracy: DeiT-Tiny on labelled photographs.

``python -m benchmarks.accuracy`` prints a table and writes results/accuracy-*.json. Accuracy is
measured with ``inner="eager"``; ``--time`` also compiles every row with Inductor and times it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import tokenpass
from benchmarks.compiling import calls, compiled, flops_share
from benchmarks.data import batches, labels
from benchmarks.environment import prepare, save
from benchmarks.reference_models import deit_tiny
from benchmarks.scores import Scores, against_random, score_table, summary
from benchmarks.timing import interleaved
from benchmarks.tome import ToMe, count_flops
from tokenpass.methods import DEFAULT_KEEP

SIZE, BATCH, TIMED_BATCH = 224, 25, 8
SEEDS = (0, 1, 2)
MERGED = (8, 12, 13, 16)
FLOPS_TARGETS = (0.6,)
METHODS: dict[str, dict[str, Any]] = {
    "HiPrune + merge": {"dropped": "merge"},
    "HiPrune + discard": {"dropped": "discard"},
    "class attention + merge": {"dropped": "merge", "ranking": "class"},
    "random + merge": {"dropped": "merge", "ranking": "random"},
    "random": {"dropped": "discard", "ranking": "random"},
}


def budget_for(model: nn.Module, target: float) -> float:
    """The keep ratio, in hundredths, whose share of the FLOPs is nearest to ``target``."""
    image = torch.zeros(1, 3, SIZE, SIZE)

    def share(percent: int) -> float:
        report = tokenpass.explain(model, image, method=tokenpass.HiPrune(keep=percent / 100))
        return report.flops / report.flops_before

    low, high = 1, 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle) < target else (low, middle)
    return min((low, high), key=lambda percent: abs(share(percent) - target)) / 100


def pruned(model: nn.Module, method: str, keep: float, inner: str) -> Any:
    return compiled(model, keep=keep, inner=inner, always_rewrite=True, **METHODS[method])


class Study:
    """All variants of a model, run on the same batches.

    Args:
        model: DeiT-Tiny.
        keeps: Budgets to be measured.
    """

    def __init__(self, model: nn.Module, keeps: list[float]) -> None:
        self.model = model
        self.keeps = keeps
        self.pruned = {name: pruned(model, name, keeps[0], "eager") for name in METHODS}
        self.tome = {merged: ToMe(model, merged) for merged in MERGED}
        self.full = Scores("full model", None, flops_share=1.0)
        self.rows = [Scores(name, keep) for keep in keeps for name in METHODS]
        self.tome_rows = [Scores("ToMe", f"r = {merged}") for merged in MERGED]
        self._batch = 0

    def step(self, images: Tensor, wanted: Tensor) -> None:
        """Run every variant on one batch."""
        expected = self.model(images)
        self.full.add(expected, expected, wanted)
        for row in self.rows:
            seeds = SEEDS if METHODS[row.method].get("ranking") == "random" else SEEDS[:1]
            outputs = [self._pruned(row, images, seed) for seed in seeds]
            row.add(torch.stack(outputs), expected, wanted)
        for row, model in zip(self.tome_rows, self.tome.values(), strict=True):
            row.add(model(images), expected, wanted)
        self._batch += 1

    def _pruned(self, row: Scores, images: Tensor, seed: int) -> Tensor:
        assert isinstance(row.budget, float)
        fast = self.pruned[row.method]
        torch.manual_seed(seed + len(SEEDS) * self._batch)
        if self._batch or row.budget != self.keeps[0]:
            tokenpass.set_budget(fast, keep=row.budget)
        output: Tensor = fast(images)
        row.flops_share = flops_share(fast)
        return output

    def count_tome(self) -> None:
        images = torch.zeros(1, 3, SIZE, SIZE)
        before = count_flops(self.model, images)
        for row, model in zip(self.tome_rows, self.tome.values(), strict=True):
            row.flops_share = count_flops(model, images) / before

    def time(self, rounds: int) -> None:
        """Milliseconds an image of every row, all compiled with Inductor."""
        images = torch.randn(TIMED_BATCH, 3, SIZE, SIZE)
        rows = [self.full, *self.rows, *self.tome_rows]
        functions = {str(place): self._timed(row) for place, row in enumerate(rows)}
        times = interleaved(calls(functions, images), rounds)
        for key, found in times.items():
            rows[int(key)].milliseconds = 1e3 * found.median / TIMED_BATCH

    def _timed(self, row: Scores) -> Any:
        if row is self.full:
            return torch.compile(self.model)
        if isinstance(row.budget, float):
            return pruned(self.model, row.method, row.budget, "inductor")
        return torch.compile(self.tome[MERGED[self.tome_rows.index(row)]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, help="how many photographs (default: all)")
    parser.add_argument("--keeps", type=float, nargs="+", help="budgets instead of the usual ones")
    parser.add_argument("--time", action="store_true", help="time every row; minutes of compiling")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    prepare(arguments.threads)
    model = deit_tiny()
    keeps = arguments.keeps or [
        0.5,
        DEFAULT_KEEP,
        *(budget_for(model, target) for target in FLOPS_TARGETS),
    ]
    study = Study(model, sorted(set(keeps), reverse=True))
    total = -(-len(labels(arguments.images)) // BATCH)
    with torch.inference_mode():
        for images, wanted in track(batches(SIZE, BATCH, arguments.images), "photos", total=total):
            study.step(images, wanted)
        study.count_tome()
        if arguments.time:
            study.time(arguments.rounds)
    rows = [study.full, *study.rows, *study.tome_rows]
    print(score_table(rows, study.full))
    print()
    print(against_random(study.rows))
    results = {
        "images": study.full.count,
        "default_keep": DEFAULT_KEEP,
        "seeds_of_random": len(SEEDS),
        "rows": [summary(row, study.full) for row in rows],
    }
    Console().print(f"written: {save('accuracy', results).name}")


if __name__ == "__main__":
    main()
