"""Wall time of ViT-S/16: eager, Inductor, and tokenpass at several budgets, in one process.

``python -m benchmarks.speed`` writes results/speed-*.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.compiling import calls, compiled, flops_share
from benchmarks.environment import device, prepare, save
from benchmarks.reference_models import vit_small
from benchmarks.tables import markdown
from benchmarks.timing import Times, interleaved
from tokenpass.methods import DEFAULT_KEEP

BATCH, SIZE = 8, 224
KEEPS = tuple(sorted({1.0, 0.7, 0.5, DEFAULT_KEEP, 0.25}, reverse=True))
BASELINE = "Inductor"
SCORES = "tokenpass::attention_received"
PROFILED_CALLS = 5
Rows = list[dict[str, Any]]
BARS = {
    "time ratio over FLOPs ratio at keep 0.5": 1.15,
    "time ratio at keep 1.0": 1.02,
    "cost of the scores over time of the unpruned encoder": 0.03,
}


def title(keep: float) -> str:
    return f"tokenpass, keep {keep:g}"


def variants(model: nn.Module) -> dict[str, Any]:
    """All of them, named."""
    fast = {title(keep): compiled(model, keep=keep) for keep in KEEPS}
    return {"eager": model, BASELINE: torch.compile(model), **fast}


def share_of_scores(fast: Any, images: Tensor) -> float:
    """Time inside the operator that computes scores, as a share of the whole call's."""
    on_gpu = images.is_cuda
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as recorded:
        for _ in range(PROFILED_CALLS):
            with torch.profiler.record_function(BASELINE):
                fast(images)
    totals = {
        event.key: event.device_time_total if on_gpu else event.cpu_time_total
        for event in recorded.key_averages()
    }
    return float(totals.get(SCORES, 0.0) / totals[BASELINE])


def row(name: str, times: Times, baseline: Times, flops: float) -> dict[str, Any]:
    ratio = times.ratio_to(baseline)
    return {
        "variant": name,
        "median_ms": 1e3 * times.median,
        "iqr_ms": 1e3 * times.spread,
        "time_ratio": ratio,
        "flops_ratio": flops,
        "time_over_flops": ratio / flops,
        "rounds_ms": [round(1e3 * second, 3) for second in times.seconds],
    }


def measure(rounds: int) -> dict[str, Any]:
    """Compile, warm up, time in turns, then profile the default budget and keep 0.5."""
    model = vit_small().to(device())
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device())
    with torch.inference_mode():
        functions = variants(model)
        times = interleaved(calls(functions, images), rounds)
        flops = {title(keep): flops_share(functions[title(keep)]) for keep in KEEPS if keep < 1.0}
        profiled = (title(DEFAULT_KEEP), title(0.5))
        shares = {name: share_of_scores(functions[name], images) for name in profiled}
    rows = [row(name, t, times[BASELINE], flops.get(name, 1.0)) for name, t in times.items()]
    scores = [
        {
            "variant": name,
            "of_pruned_call": share,
            "of_unpruned_call": share * times[name].ratio_to(times[BASELINE]),
        }
        for name, share in shares.items()
    ]
    return {"rows": rows, "scores": scores, "verdict": verdict(rows, scores)}


def verdict(rows: Rows, scores: Rows) -> dict[str, dict[str, float]]:
    """What was measured beside what is allowed."""
    by_name = {found["variant"]: found for found in rows}
    measured = (
        by_name[title(0.5)]["time_over_flops"],
        by_name[title(1.0)]["time_ratio"],
        max(found["of_unpruned_call"] for found in scores),
    )
    return {
        name: {"measured": value, "allowed": allowed}
        for (name, allowed), value in zip(BARS.items(), measured, strict=True)
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        (
            found["variant"],
            f"{found['median_ms']:.1f} ± {found['iqr_ms'] / 2:.1f}",
            f"{found['time_ratio']:.3f}",
            f"{found['flops_ratio']:.3f}",
            f"{found['time_over_flops']:.3f}",
        )
        for found in results["rows"]
    ]
    titles = ("variant", "ms ± half IQR", "time / Inductor", "FLOPs", "time / FLOPs")
    return markdown(titles, lines)


def run(rounds: int = 15) -> None:
    """Measure, print, write."""
    results = measure(rounds)
    print(table(results))
    for found in results["scores"]:
        print(f"scores, {found['variant']}: {found['of_pruned_call']:.3f} of the pruned call")
    for name, found in results["verdict"].items():
        print(f"{name}: {found['measured']:.3f} (at most {found['allowed']:.2f})")
    Console().print(f"written: {save('speed', results).name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare(arguments.threads)
    run(arguments.rounds)


if __name__ == "__main__":
    main()
