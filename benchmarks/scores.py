"""Per-image scores of a classifier against the unpruned one, and their summaries.

Standard errors are paired: of the mean of a difference taken image by image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import markdown


@dataclass
class Scores:
    """One row of the table.

    Attributes:
        method: What chooses tokens.
        budget: Keep ratio, or ``r`` of ToMe.
        flops_share: Of the unpruned model's FLOPs.
        milliseconds: For an image; ``None`` if not timed.
        correct: For each image whether its class is right, a mean over seeds.
        agrees: The same for agreement with the unpruned model's class.
        divergence: Kullback-Leibler divergence from the unpruned model's probabilities.
    """

    method: str
    budget: float | str | None
    flops_share: float = math.nan
    milliseconds: float | None = None
    correct: list[float] = field(default_factory=list)
    agrees: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, expected: Tensor, labels: Tensor) -> None:
        """Score a batch.

        Args:
            logits: ``(B, classes)``, or ``(seeds, B, classes)``.
            expected: Of the unpruned model, ``(B, classes)``.
            labels: ``(B,)``.
        """
        runs = logits if logits.dim() == 3 else logits[None]
        answers = runs.argmax(-1)
        full = expected.log_softmax(-1)
        divergence = (full.exp() * (full - runs.log_softmax(-1))).sum(-1)
        self.correct += (answers == labels).double().mean(0).tolist()
        self.agrees += (answers == expected.argmax(-1)).double().mean(0).tolist()
        self.divergence += divergence.double().mean(0).tolist()

    @property
    def count(self) -> int:
        return len(self.correct)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    x = torch.tensor(values, dtype=torch.float64)
    error = x.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return x.mean().item(), error


def difference(mine: Sequence[float], its: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, image by image, and its standard error."""
    return mean_and_error([a - b for a, b in zip(mine, its, strict=True)])


def summary(row: Scores, full: Scores) -> dict[str, Any]:
    """A row as it is written to the results."""
    change, change_error = difference(row.correct, full.correct)
    agreement, agreement_error = mean_and_error(row.agrees)
    divergence, divergence_error = mean_and_error(row.divergence)
    return {
        "method": row.method,
        "budget": row.budget,
        "flops_share": row.flops_share,
        "top1": mean_and_error(row.correct)[0],
        "top1_change": change,
        "top1_change_error": change_error,
        "agreement": agreement,
        "agreement_error": agreement_error,
        "divergence": divergence,
        "divergence_error": divergence_error,
        "milliseconds_per_image": row.milliseconds,
    }


def score_table(rows: Sequence[Scores], full: Scores) -> str:
    titles = ("keep", "method", "FLOPs", "top-1 %", "change", "agreement %", "KL", "ms/image")
    return markdown(titles, [_line(summary(row, full)) for row in rows])


def _line(found: dict[str, Any]) -> tuple[object, ...]:
    time = found["milliseconds_per_image"]
    return (
        found["budget"] or "",
        found["method"],
        f"{found['flops_share']:.3f}",
        f"{100 * found['top1']:.1f}",
        _points(found["top1_change"], found["top1_change_error"], sign="+"),
        _points(found["agreement"], found["agreement_error"]),
        f"{found['divergence']:.4f}",
        "" if time is None else f"{time:.1f}",
    )


def _points(share: float, error: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f} ± {100 * error:.1f}"


def against_random(rows: Sequence[Scores]) -> str:
    """HiPrune against random selection with the same merging, image by image."""
    by_name = {(row.method, row.budget): row for row in rows}
    lines = []
    for budget in dict.fromkeys(row.budget for row in rows):
        mine, its = (by_name[f"{name} + merge", budget] for name in ("HiPrune", "random"))
        change, change_error = difference(mine.divergence, its.divergence)
        lines.append(
            (
                budget,
                _points(*difference(mine.correct, its.correct), sign="+"),
                _points(*difference(mine.agrees, its.agrees), sign="+"),
                f"{change:+.4f} ± {change_error:.4f}",
            )
        )
    return markdown(("keep", "HiPrune - random, top-1", "agreement", "KL"), lines)
