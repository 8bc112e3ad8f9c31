"""A vision-language model with fewer visual tokens.

python -m examples.vlm                                  # a tiny random model, offline
python -m examples.vlm --model PATH --image FILE        # a real one, from a local folder
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import tokenpass
from tokenpass import HiPrune, selectors

KEEPS = (1.0, 1 / 3, 2 / 9, 1 / 9)
"""Shares of visual tokens: the settings of the HiPrune paper, 576 to 64 of 576 tokens."""

IMAGE_TOKEN = 99


def tiny_model() -> tuple[Any, dict[str, torch.Tensor]]:
    """LLaVA with random weights and 576 visual tokens, and a prompt with one image."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Model

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=6, image_size=336, patch_size=14)
    text = LlamaConfig(
        **sizes, num_hidden_layers=4, num_key_value_heads=4, vocab_size=100, eos_token_id=None
    )
    model = Model(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    ).eval()
    prompt = torch.tensor([[1, 5, *[IMAGE_TOKEN] * 576, 7, 8, 9]])
    return model, {"input_ids": prompt, "pixel_values": torch.randn(1, 3, 336, 336)}


def real_model(path: str, image: str, question: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model from a local folder, and its processor's inputs."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(path)
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    return AutoModelForImageTextToText.from_pretrained(path).eval(), dict(inputs)


def compare(model: Any, inputs: dict[str, torch.Tensor], steps: int) -> list[str]:
    """A line for each budget: tokens, cost, and how many generated tokens are as without it."""
    fast = tokenpass.vlm(model, HiPrune(keep=KEEPS[-1]))
    lines = [f"{'keep':>6} {'visual tokens':>14} {'prefill FLOPs':>14} {'cache':>8} {'same':>6}"]
    full = model.generate(**inputs, max_new_tokens=steps, do_sample=False)[:, -steps:]
    for keep in KEEPS:
        fast.set_budget(keep)
        found = fast.generate(**inputs, max_new_tokens=steps, do_sample=False)[:, -steps:]
        same = int((found == full).long().cumprod(1).sum())
        if keep == 1.0:
            lines.append(f"{keep:>6.2f} {'all':>14} {1.0:>14.2f} {1.0:>8.2f} {same:>4}/{steps}")
            continue
        stats = fast.stats()
        tokens = f"{stats.visual_tokens}/{stats.visual_tokens_before}"
        flops = stats.prefill_flops / stats.prefill_flops_before
        cache = stats.cache_bytes / stats.cache_bytes_before
        lines.append(f"{keep:>6.2f} {tokens:>14} {flops:>14.2f} {cache:>8.2f} {same:>4}/{steps}")
    return lines


def overlap(model: Any, inputs: dict[str, torch.Tensor]) -> list[str]:
    """How many tokens other selectors keep that HiPrune keeps, at the smallest budget."""
    method = HiPrune(keep=KEEPS[-1])
    ours = tokenpass.vlm(model, method)
    ours(**inputs)
    kept = ours.kept()[0]
    lines = []
    for name in selectors.__all__:
        other = tokenpass.vlm(model, method, selector=getattr(selectors, name))
        other(**inputs)
        shared = int(torch.isin(other.kept()[0], kept).sum())
        lines.append(f"{name:>16}: {shared} of {len(kept)} kept tokens are HiPrune's")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a model; default: a tiny random one")
    parser.add_argument("--image", help="file of an image")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--steps", type=int, default=16, help="tokens to generate")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    if given.model:
        model, inputs = real_model(given.model, given.image, given.question)
    else:
        model, inputs = tiny_model()
    with torch.inference_mode():
        print("\n".join(compare(model, inputs, given.steps)))
        print("\n".join(overlap(model, inputs)))


if __name__ == "__main__":
    main()
