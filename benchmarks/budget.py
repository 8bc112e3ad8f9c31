"""A budget that changes on every call, against one that stays: time, and what is compiled.

``python -m benchmarks.budget`` writes results/budget-*.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import tokenpass
from benchmarks.environment import device
from benchmarks.gating import PATCH, walk
from benchmarks.reference_models import vit_small
from benchmarks.suite import Case, Column, Suite, timed
from benchmarks.timing import Call, interleaved
from tokenpass import compiler_torch_internals as compiler_internals

KEEPS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55)
"""The budgets, in the order in which calls ask for them."""

SIDE, DEPTH, BATCH = 14, 12, 1
METHODS: dict[str, type[tokenpass.HiPrune] | type[tokenpass.Eventful]] = {
    "hiprune": tokenpass.HiPrune,
    "eventful": tokenpass.Eventful,
}


class Counting:
    """Inductor, and how many graphs it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return compiler_internals.inner_compile("inductor", module, inputs, None)


def compiled(model: nn.Module, method: str) -> tuple[Any, Counting]:
    """The model at the mean budget."""
    inner = Counting()
    options: dict[str, Any] = {"scene_cut": None} if method == "eventful" else {}
    chosen = METHODS[method](keep=statistics.fmean(KEEPS), **options)
    return torch.compile(model, backend=tokenpass.backend(chosen, inner=inner)), inner


def calls(fast: Any, images: Sequence[Tensor], keeps: Sequence[float]) -> Call:
    """One call at each of the budgets."""

    def run() -> None:
        for number, keep in enumerate(keeps):
            tokenpass.set_budget(fast, keep=keep)
            fast(images[number % len(images)])

    return run


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))


def measure(wanted: argparse.Namespace) -> Iterator[Case]:
    for method in wanted.methods:
        torch._dynamo.reset()
        batch = BATCH if method == "hiprune" else 1
        images = walk(SIDE)
        if method == "hiprune":
            images = [torch.randn(BATCH, 3, SIDE * PATCH, SIDE * PATCH, device=device())]
        fast, inner = compiled(vit_small(DEPTH, SIDE * PATCH).to(device()), method)
        mean = [statistics.fmean(KEEPS)] * len(KEEPS)
        with torch.inference_mode():
            fast(images[0])
            variants = {
                "changing": calls(fast, images, KEEPS),
                "fixed": calls(fast, images, mean),
            }
            for call in variants.values():
                call()
            before = inner.graphs
            times = interleaved(variants, wanted.rounds, warm_up=1)
        again = inner.graphs - before
        rows = [
            {"variant": name, **timed(t, times["fixed"]), "graphs": before, "recompilations": again}
            for name, t in times.items()
        ]
        yield {"method": method, "batch": batch, "budgets": len(KEEPS)}, rows


SUITE = Suite(
    name="budget",
    about="a budget that changes on every call",
    options=options,
    measure=measure,
    columns=(
        Column("method", "method"),
        Column("batch", "batch"),
        Column("budget", "variant"),
        Column("ms for eight calls", "median_ms", ".1f"),
        Column("IQR", "iqr_ms", ".1f"),
        Column("of the fixed budget's", "time_ratio", ".3f"),
        Column("graphs compiled", "graphs"),
        Column("after warm-up", "recompilations"),
    ),
    rounds=7,
)

if __name__ == "__main__":
    SUITE.main()
