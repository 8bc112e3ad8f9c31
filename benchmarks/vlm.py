"""A vision-language model with fewer visual tokens: time to first token and to each further one.

CLIP ViT-L/14 at 336 pixels, a projector and a language model of half a billion parameters, as LLaVA
puts them together; random weights, one image of 576 visual tokens. All variants run in one process,
in turns. ``python -m benchmarks.vlm`` writes results/vlm-*.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tokenpass
from benchmarks.environment import device, prepare, save
from benchmarks.reference_models import declare_operators
from benchmarks.tables import markdown
from benchmarks.timing import Times, interleaved
from tokenpass import HiPrune

KEEPS = (1.0, 1 / 3, 2 / 9, 1 / 9)
"""Shares of visual tokens: the settings of the HiPrune paper, 576 to 64 of 576 tokens."""

RANKINGS = {"HiPrune": "received", "random": "random"}
TEXT_TOKENS = 64
STEPS = 8
"""Tokens decoded in each round."""

BASELINE = "the model itself"
IMAGE_TOKEN = 100
BAR = 1.15
"""What the ratio of times may be of the ratio of FLOPs."""

Rows = list[dict[str, Any]]
Calls = dict[str, Callable[[], Any]]


def build(layers: int) -> Any:
    """LLaVA with random weights: CLIP-L/14-336, and a Qwen2 of 0.5 B at 24 layers."""
    declare_operators()
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config
    from transformers import LlavaForConditionalGeneration as Model

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    torch.manual_seed(0)
    return Model(config).to(device()).eval()


def prompt() -> dict[str, Tensor]:
    """One image between two halves of a text."""
    torch.manual_seed(0)
    words = torch.randint(IMAGE_TOKEN, (TEXT_TOKENS,)).tolist()
    half = TEXT_TOKENS // 2
    ids = torch.tensor([[*words[:half], *[IMAGE_TOKEN] * 576, *words[half:]]], device=device())
    pixels = torch.randn(1, 3, 336, 336, device=device())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def title(ranking: str, keep: float) -> str:
    return f"{ranking}, keep {round(576 * keep)} of 576"


class Variant:
    """A model at one budget; models that share what was explored differ in the budget alone."""

    def __init__(self, model: Any, keep: float | None, inputs: dict[str, Tensor]) -> None:
        self._model = model
        self._keep = keep
        self._inputs = inputs
        self._cache: Any = None

    def _set(self) -> Any:
        if self._keep is not None:
            tokenpass.set_budget(self._model, keep=self._keep)
        return self._model

    def first_token(self) -> Any:
        """Encoder, projector, selection, prefill and the choice of one token."""
        return self._set().generate(**self._inputs, max_new_tokens=1, do_sample=False)

    def prefill(self) -> None:
        """The same without the choice; the cache stays at hand."""
        made = self._set()(**self._inputs, use_cache=True, logits_to_keep=1)
        self._cache = made.past_key_values

    def further_tokens(self) -> None:
        """Decode :data:`STEPS` tokens behind the prompt."""
        token = torch.tensor([[1]], device=device())
        for _ in range(STEPS):
            self._model(input_ids=token, past_key_values=self._cache, use_cache=True)
        self._cache.crop(-STEPS)


def variants(model: Any, inputs: dict[str, Tensor]) -> dict[str, Variant]:
    """The model itself, and with fewer tokens."""
    made = {BASELINE: Variant(model, None, inputs)}
    for name, ranking in RANKINGS.items():
        fast = tokenpass.vlm(model, HiPrune(ranking=ranking))  # type: ignore[arg-type]
        for keep in KEEPS if name == "HiPrune" else KEEPS[1:]:
            made[title(name, keep)] = Variant(fast, keep, inputs)
    return made


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    total: int = counter.get_total_flops()
    return total


def row(name: str, first: dict[str, Times], further: dict[str, Times], share: float) -> Any:
    ratio = first[name].ratio_to(first[BASELINE])
    return {
        "variant": name,
        "first_token_ms": 1e3 * first[name].median,
        "first_token_iqr_ms": 1e3 * first[name].spread,
        "first_token_fastest_ms": 1e3 * min(first[name].seconds),
        "first_token_ratio": ratio,
        "flops_ratio": share,
        "time_over_flops": ratio / share,
        "per_token_ms": 1e3 * further[name].median / STEPS,
        "per_token_iqr_ms": 1e3 * further[name].spread / STEPS,
        "per_token_ratio": further[name].ratio_to(further[BASELINE]),
        "rounds_ms": [round(1e3 * second, 2) for second in first[name].seconds],
    }


def measure(rounds: int, layers: int) -> dict[str, Any]:
    """Explore, count, warm up, time in turns."""
    made = variants(build(layers), prompt())
    calls: Calls = {name: one.first_token for name, one in made.items()}
    decoding: Calls = {name: one.further_tokens for name, one in made.items()}
    with torch.inference_mode():
        for name in RANKINGS:
            made[title(name, KEEPS[-1])].prefill()  # explores, so that what is counted does not
        counts = {name: flops(one.prefill) for name, one in made.items()}
        first = interleaved(calls, rounds, warm_up=0)
        further = interleaved(decoding, rounds, warm_up=1)
    rows = [row(n, first, further, counts[n] / counts[BASELINE]) for n in calls]
    worst = max(found["time_over_flops"] for found in rows if found["flops_ratio"] < 1)
    return {
        "layers": layers,
        "gflops": counts[BASELINE] / 1e9,
        "rows": rows,
        "verdict": {"time ratio over FLOPs ratio": {"measured": worst, "allowed": BAR}},
    }


def table(rows: Rows) -> str:
    lines = [
        (
            found["variant"],
            f"{found['first_token_ms']:.0f} ± {found['first_token_iqr_ms'] / 2:.0f}",
            f"{found['first_token_ratio']:.3f}",
            f"{found['flops_ratio']:.3f}",
            f"{found['time_over_flops']:.3f}",
            f"{found['per_token_ms']:.0f} ± {found['per_token_iqr_ms'] / 2:.0f}",
            f"{found['per_token_ratio']:.3f}",
        )
        for found in rows
    ]
    titles = ("", "first token, ms", "ratio", "FLOPs", "time / FLOPs", "per token, ms", "ratio")
    return markdown(titles, lines)


def run(rounds: int, layers: int) -> None:
    """Measure, print, write."""
    results = measure(rounds, layers)
    print(table(results["rows"]))
    for name, found in results["verdict"].items():
        print(f"{name}: {found['measured']:.3f} (at most {found['allowed']:.2f})")
    Console().print(f"written: {save('vlm', results).name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--layers", type=int, default=24, help="of both, at least 2; fewer to try the script"
    )
    arguments = parser.parse_args()
    prepare(arguments.threads)
    run(arguments.rounds, max(2, arguments.layers))


if __name__ == "__main__":
    main()
