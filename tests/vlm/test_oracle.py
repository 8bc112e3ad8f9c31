"""The recorded selections of the published code, through a vision-language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tokenpass
from tests.vlm.models import IMAGE, text
from tokenpass import HiPrune, OptionError

DATA = Path(__file__).resolve().parents[3] / "shared" / "oracle" / "hiprune"
PATCHES = 576

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no recorded selections at {DATA}")


def cases() -> list[dict[str, Any]]:
    path = DATA / "clip_cases.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["cases"] if path.is_file() else []
    return found


def llava(data: dict[str, torch.Tensor]) -> Any:
    """A LLaVA whose tower is the recorded one."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Model

    tower = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    words = LlamaConfig(**text())
    model = Model(LlavaConfig(vision_config=tower, text_config=words, image_token_id=IMAGE)).eval()
    prefix = "model.vision_model."
    weights = {n.removeprefix(prefix): x for n, x in data.items() if n.startswith(prefix)}
    model.model.vision_tower.load_state_dict(weights)
    return model


@pytest.mark.parametrize("case", cases(), ids=lambda case: str(case["name"]))
def test_recorded_selection(case: dict[str, Any]) -> None:
    """Breaks if the integration scores other layers or shares the budget otherwise."""
    data = load_file(DATA / "clip_tiny.safetensors")
    first, stop = case["images"]
    method = HiPrune(
        keep=case["retention"],
        alpha=float(case["alpha"]),
        object_layer=case["object_layer"],
        compat="llava",
    )
    fast = tokenpass.vlm(llava(data), method)
    prompts = torch.tensor([[2, *[IMAGE] * PATCHES, 3]] * (stop - first))
    pixels = (data["pixels_uint8"][first:stop] / 255 - 0.5) * 6
    with torch.no_grad():
        if "error" in case:
            with pytest.raises(OptionError, match="the published code fails here"):
                fast(input_ids=prompts, pixel_values=pixels)
            return
        fast(input_ids=prompts, pixel_values=pixels)
    for kept, mask in zip(fast.kept(), data[f"{case['name']}.mask"], strict=True):
        assert kept.tolist() == mask.nonzero().squeeze(1).tolist()
