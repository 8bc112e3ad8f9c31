"""Peak memory of computing scores on a long sequence, beyond queries and keys.

``python -m benchmarks.memory`` writes results/memory-*.json. On a CPU the peak is that of the whole
process, which therefore does nothing else.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.environment import device, prepare, save
from benchmarks.timing import once
from tokenpass.kernels import attention_received

TOKENS, HEADS, WIDTH = 16_384, 12, 64
WARM_UP_TOKENS = 256
MEGABYTE = 10**6
BAR_MB = 200
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


def scores(query: Tensor, key: Tensor) -> Tensor:
    found: Tensor = attention_received(query, key, WIDTH**-0.5, None, None)
    return found


def resident_bytes() -> int:
    """Memory of the process now; its peak where the system does not say."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_bytes()
    return int(status.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most memory that the process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT


def measure(tokens: int) -> dict[str, Any]:
    """An upper bound on a CPU: a peak that came earlier counts too."""
    where = device()
    small = torch.randn(1, HEADS, WARM_UP_TOKENS, WIDTH, device=where)
    scores(small, small)
    query, key = (torch.randn(1, HEADS, tokens, WIDTH, device=where) for _ in range(2))
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = once(lambda: scores(query, key))
        extra = torch.cuda.max_memory_allocated() - before
    else:
        before = resident_bytes()
        seconds = once(lambda: scores(query, key))
        extra = max(0, peak_bytes() - before)
    return {
        "tokens": tokens,
        "heads": HEADS,
        "extra_mb": extra / MEGABYTE,
        "one_map_mb": 4 * tokens * tokens / MEGABYTE,
        "seconds": seconds,
    }


def run(tokens: int = TOKENS) -> None:
    """Measure, print, write."""
    found = measure(tokens)
    print(
        f"scores of {tokens} tokens, {HEADS} heads: {found['extra_mb']:.0f} MB extra "
        f"(at most {BAR_MB}; the map of one head alone: {found['one_map_mb']:.0f} MB), "
        f"{found['seconds']:.1f} s"
    )
    Console().print(f"written: {save('memory', found).name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare(arguments.threads)
    run(arguments.tokens)


if __name__ == "__main__":
    main()
