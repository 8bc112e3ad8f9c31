"""What the passes add to compilation: their share of it, and how they grow with depth.

``python -m benchmarks.compile_time`` writes results/compile_time-*.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import fx

import tokenpass
from benchmarks.environment import device, prepare, save
from benchmarks.reference_models import vit_small
from benchmarks.tables import markdown
from tokenpass import torch_internals as internals

DEPTHS = (12, 24, 48)
WARM_UP_DEPTH = 2
SHARE_DEPTH = 12
BAR = 0.15


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
        run = internals.inner_compile(self._name, module, inputs, None)
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
    return {"compile_s": total, "passes_s": passes, "inner_s": watch.inner}


def measure(repeats: int) -> dict[str, Any]:
    """Compile with Inductor once; then the passes alone, the fastest of ``repeats``."""
    with tempfile.TemporaryDirectory() as folder:
        # What an earlier run has compiled would be found again, and the whole look faster.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        torch.compiler.config.force_disable_caches = True
        first_call(WARM_UP_DEPTH, "inductor")
        whole = first_call(SHARE_DEPTH, "inductor")
    rows = []
    for depth in DEPTHS:
        found = min((first_call(depth, "eager") for _ in range(repeats)), key=_passes)
        rows.append({"depth": depth, **found, "per_block_s": _passes(found) / depth})
    share = whole["passes_s"] / whole["compile_s"]
    return {"with_inductor": {"depth": SHARE_DEPTH, "share": share, **whole}, "passes": rows}


def _passes(found: dict[str, float]) -> float:
    return found["passes_s"]


def table(results: dict[str, Any]) -> str:
    lines = [
        (found["depth"], f"{found['passes_s']:.2f}", f"{1e3 * found['per_block_s']:.0f}")
        for found in results["passes"]
    ]
    return markdown(("blocks", "passes, s", "ms a block"), lines)


def run(repeats: int = 3) -> None:
    """Measure, print, write."""
    results = measure(repeats)
    whole = results["with_inductor"]
    print(table(results))
    print(
        f"share of the passes in compiling {whole['depth']} blocks with Inductor: "
        f"{whole['share']:.3f} of {whole['compile_s']:.1f} s (at most {BAR:.2f})"
    )
    Console().print(f"written: {save('compile_time', results).name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare(arguments.threads)
    run(arguments.repeats)


if __name__ == "__main__":
    main()
