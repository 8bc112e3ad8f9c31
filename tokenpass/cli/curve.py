"""What budgets cost in answers, FLOPs and time, on a user's own images or clips."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tokenpass
from tokenpass.cli.answers import agreement, answer_of, classifies
from tokenpass.cli.clips import pictures
from tokenpass.cli.models import Loaded
from tokenpass.cli.pictures import input_of, read, size_of
from tokenpass.cli.screen import InputError
from tokenpass.methods import Eventful, Method
from tokenpass.options import Settings
from tokenpass.timing import interleaved

POINTS = 100
"""Points in the whole."""

CLIP_ENDINGS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v")


@dataclass(frozen=True)
class Batch:
    """Images that are run together, or one frame of a clip.

    Attributes:
        images: ``(B, 3, H, W)``, normalised.
        labels: Their classes, ``(B,)``; ``None`` if there are none.
        first: Whether it is the first frame of a clip.
    """

    images: Tensor
    labels: Tensor | None = None
    first: bool = False


@dataclass
class Row:
    """A budget. Scores are one for each image, from 0 to 1.

    Attributes:
        keep: The budget.
        scores: Of the chosen tokens.
        random: Of as many random ones.
        shares: Of the FLOPs, one for each call.
        ms: Milliseconds an image.
    """

    keep: int | float
    scores: list[float] = field(default_factory=list)
    random: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    ms: float | None = None

    def summary(self, baseline: Sequence[float]) -> dict[str, Any]:
        """The row as it is written to a config; ``baseline`` are the scores of all tokens."""
        loss, error = _loss(baseline, self.scores)
        return {
            "keep": self.keep,
            "loss": loss,
            "loss_error": error,
            "random_loss": _loss(baseline, self.random)[0] if self.random else None,
            "score": round(POINTS * mean(self.scores), 2),
            "flops": round(mean(self.shares), 4),
            "ms": None if self.ms is None else round(self.ms, 3),
        }


def _loss(baseline: Sequence[float], scores: Sequence[float]) -> tuple[float, float]:
    """Mean difference in points and its standard error, image by image."""
    lost = [a - b for a, b in zip(baseline, scores, strict=True)]
    error = stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else 0.0
    return round(POINTS * mean(lost), 3), round(POINTS * error, 3)


class Curve:
    """All budgets of a model, run on the same images.

    Scored is the right class where there are labels, and else the agreement with all tokens.

    Args:
        loaded: The model.
        settings: How to compile it; its budget does not matter.
        keeps: The budgets.
        seeds: Of random selections that are averaged; none leaves them out.
    """

    def __init__(
        self, loaded: Loaded, settings: Settings, keeps: Sequence[int | float], seeds: int
    ) -> None:
        self.loaded = loaded
        self.settings = settings
        self.rows = [Row(keep) for keep in keeps]
        self.seeds = seeds
        self.baseline: list[float] = []
        self._calls = 0
        method = settings.method
        if isinstance(method, Eventful):
            method = replace(method, max_streams=max(1, seeds) * len(keeps) + 1)
        self._fast = self._compiled(method, "eager")
        self._random = self._compiled(replace(method, ranking="random"), "eager")

    def _compiled(self, method: Method, inner: Any) -> Any:
        always = self.settings.always_rewrite
        backend = tokenpass.backend(method, inner=inner, always_rewrite=always)
        return torch.compile(self.loaded.model, backend=backend)

    def add(self, batch: Batch) -> None:
        """Run every budget on a batch; the first frame of a clip is run in full and not scored."""
        call = self.loaded.call
        expected = answer_of(call(self.loaded.model, batch.images))
        if batch.labels is not None and not classifies(expected):
            raise InputError(f"{self.loaded.name} gives no scores of classes: leave out --labels")
        if batch.first:
            self._begin(batch)
            return
        self.baseline += self._scores(batch, expected, expected)
        for row in self.rows:
            answer = self._answer(self._fast, row.keep, batch)
            row.scores += self._scores(batch, answer, expected)
            stats = tokenpass.stats(self._fast)
            row.shares.append(stats.flops / stats.flops_before)
            runs = []
            for seed in range(self.seeds):
                torch.manual_seed(seed + self.seeds * self._calls)
                answer = self._answer(self._random, row.keep, batch, stream=seed)
                runs.append(self._scores(batch, answer, expected))
            row.random += [mean(scores) for scores in zip(*runs, strict=True)]
        self._calls += 1

    def _begin(self, batch: Batch) -> None:
        """A new clip: every stream starts afresh."""
        for fast, streams in ((self._fast, 1), (self._random, self.seeds)):
            if _has_run(fast):
                tokenpass.reset(fast)
            for row in self.rows:
                for stream in range(streams):
                    self._answer(fast, row.keep, batch, stream)

    @property
    def _gated(self) -> bool:
        return isinstance(self.settings.method, Eventful)

    def _answer(self, fast: Any, keep: int | float, batch: Batch, stream: int = 0) -> Tensor:
        """What a compiled model answers; behind gates each budget has a stream of its own."""
        run = partial(self.loaded.call, fast, batch.images)
        if not _has_run(fast):
            run()
        tokenpass.set_budget(fast, keep=keep)
        if not self._gated:
            return answer_of(run())
        with tokenpass.stream(fast, f"{keep} {stream}"):
            return answer_of(run())

    def _scores(self, batch: Batch, answer: Tensor, expected: Tensor) -> list[float]:
        if batch.labels is None:
            return agreement(answer, expected).tolist()
        return (answer.argmax(1).cpu() == batch.labels).double().tolist()

    def time(self, images: Sequence[Tensor], rounds: int) -> float:
        """Time every budget, compiled as it will be used; sets ``ms`` of the rows.

        Args:
            images: Batches that calls take in turns.
            rounds: Of timing.

        Returns:
            Milliseconds an image with all tokens.
        """
        plain = torch.compile(self.loaded.model, backend=self.settings.inner)
        fast = self._compiled(self.settings.method, self.settings.inner)
        numbers = iter(range(10**9))

        def run(function: Any) -> Any:
            return self.loaded.call(function, images[next(numbers) % len(images)])

        run(fast)
        budgets = {str(row.keep): row.keep for row in self.rows}
        calls: dict[str, Callable[[], Any]] = {"": partial(run, plain)}
        calls |= {name: partial(run, fast) for name in budgets}
        before = {
            name: partial(tokenpass.set_budget, fast, keep=keep) for name, keep in budgets.items()
        }
        times = interleaved(calls, rounds, before=before)
        each = {name: 1e3 * found.median / len(images[0]) for name, found in times.items()}
        for row in self.rows:
            row.ms = each[str(row.keep)]
        return each[""]


def _has_run(fast: Any) -> bool:
    try:
        tokenpass.stats(fast)
    except tokenpass.NothingRecordedError:
        return False
    return True


def batches_of(
    loaded: Loaded, paths: Sequence[Path], labels: dict[str, int] | None, batch: int
) -> Iterator[Batch]:
    """Photographs, ``batch`` at a time."""
    size = size_of(loaded)
    for start in range(0, len(paths), batch):
        part = paths[start : start + batch]
        images = torch.cat([input_of(loaded, read(path, *size)) for path in part])
        classes = None if labels is None else torch.tensor([labels[path.name] for path in part])
        yield Batch(images, classes)


def frames_of(loaded: Loaded, paths: Sequence[Path], limit: int) -> Iterator[Batch]:
    """The first frames of each clip."""
    size = size_of(loaded)
    for path in paths:
        for number, pixels in enumerate(pictures(path, limit, size=size)):
            picture = pixels.astype(np.float32) / np.float32(255)
            yield Batch(input_of(loaded, picture), first=number == 0)


def clips_in(folder: Path) -> list[Path]:
    """The videos in a folder, sorted.

    Raises:
        InputError: If there are none.
    """
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in CLIP_ENDINGS]
    if not found:
        raise InputError(f"{folder} holds no clips ({', '.join(CLIP_ENDINGS)})")
    return found


def read_labels(path: Path, files: Sequence[Path]) -> dict[str, int]:
    """Classes by file name, from a CSV file with columns ``file`` and ``label``.

    Raises:
        InputError: If it is not of that form, or a file has no label.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not {"file", "label"} <= set(rows.fieldnames or ()):
                raise KeyError("file,label")
            labels = {Path(row["file"]).name: int(row["label"]) for row in rows}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path}: expected columns file,label with whole numbers") from error
    missing = next((file for file in files if file.name not in labels), None)
    if missing is not None:
        raise InputError(f"{path} has no label of {missing.name}")
    return labels
