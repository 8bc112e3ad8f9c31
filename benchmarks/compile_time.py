"""What the passes add to compilation: their share of it, and how they grow with depth.

``python -m benchmarks.compile_time`` writes results/compile-*.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

import tokenpass
from benchmarks.environment import device
from benchmarks.plots import Plot
from benchmarks.reference_models import vit_small
from benchmarks.suite import Case, Column, Suite
from tokenpass import compiler_torch_internals as compiler_internals

DEPTHS = (12, 24, 48)
WARM_UP_DEPTH = 2
SHARE_DEPTH = 12


class Stopwatch:
    """A ``torch.compile`` backend: tokenpass around ``inner``, each timed.

    Attributes:
        backend: Seconds inside the backend, inner one included.
        inner: Seconds inside the inner one.
    """

    def __init__(self, inner: str) -> None:
        self.backend = 0.0
        self.inner = 0.0
        self._name = inner
        self._tokenpass = tokenpass.backend(tokenpass.HiPrune(), inner=self._compile_inner)

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        run = self._tokenpass(module, inputs)
        self.backend += time.perf_counter() - start
        return run

    def _compile_inner(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        run = compiler_internals.inner_compile(self._name, module, inputs, None)
        self.inner += time.perf_counter() - start
        return run


def first_call(depth: int, inner: str) -> dict[str, float]:
    """Seconds of the first call of a ViT-S with ``depth`` blocks, and those of the passes in it."""
    torch._dynamo.reset()
    model = vit_small(depth).to(device())
    images = torch.randn(1, 3, 224, 224, device=device())
    watch = Stopwatch(inner)
    fast = torch.compile(model, backend=watch)
    with torch.inference_mode():
        model(images)
        start = time.perf_counter()
        fast(images)
        total = time.perf_counter() - start
        start = time.perf_counter()
        fast(images)
        total -= time.perf_counter() - start
    passes = watch.backend - watch.inner
    return {
        "compile_s": round(total, 3),
        "passes_s": round(passes, 3),
        "inner_s": round(watch.inner, 3),
        "share": round(passes / total, 4),
        "per_block_ms": round(1e3 * passes / depth, 2),
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))


def measure(wanted: argparse.Namespace) -> Iterator[Case]:
    """Compile with Inductor once; then the passes alone, the fastest of all rounds."""
    caches = torch.compiler.config.force_disable_caches
    with tempfile.TemporaryDirectory() as folder:
        # What an earlier run has compiled would be found again, and the whole look faster.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        torch.compiler.config.force_disable_caches = True
        first_call(WARM_UP_DEPTH, "inductor")
        yield {"inner": "inductor", "depth": SHARE_DEPTH}, [first_call(SHARE_DEPTH, "inductor")]
        torch.compiler.config.force_disable_caches = caches
    for depth in wanted.depths:
        found = (first_call(depth, "eager") for _ in range(wanted.rounds))
        yield {"inner": "eager", "depth": depth}, [min(found, key=lambda row: row["passes_s"])]


SUITE = Suite(
    name="compile",
    about="time of the passes and of the whole compilation",
    options=options,
    measure=measure,
    columns=(
        Column("inner backend", "inner"),
        Column("blocks", "depth"),
        Column("first call, s", "compile_s", ".2f"),
        Column("passes, s", "passes_s", ".2f"),
        Column("share", "share", ".3f"),
        Column("passes, ms a block", "per_block_ms", ".0f"),
    ),
    plot=Plot(
        ("depth", "blocks"), ("passes_s", "passes, s"), by=("inner",), only={"inner": "eager"}
    ),
    rounds=3,
)

if __name__ == "__main__":
    SUITE.main()
