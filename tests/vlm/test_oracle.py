"""The recorded selections of the published code, through a vision-language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tokenpass
from tests import recorded_clip
from tests.recorded_clip import DATA, recorded
from tests.vlm.models import IMAGE, text
from tokenpass import HiPrune, OptionError

PATCHES = 576

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no recorded selections at {DATA}")


def llava(data: dict[str, torch.Tensor]) -> Any:
    """A LLaVA whose tower is the recorded one."""
    from transformers import LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Model

    words = LlamaConfig(**text())
    config = LlavaConfig(
        vision_config=recorded_clip.config(), text_config=words, image_token_id=IMAGE
    )
    model = Model(config).eval()
    model.model.vision_tower.load_state_dict(recorded_clip.weights(data))
    return model


@pytest.mark.parametrize("case", recorded("clip"), ids=lambda case: str(case["name"]))
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
    pixels = recorded_clip.pixels(case, data)
    with torch.no_grad():
        if "error" in case:
            with pytest.raises(OptionError, match="the published code fails here"):
                fast(input_ids=prompts, pixel_values=pixels)
            return
        fast(input_ids=prompts, pixel_values=pixels)
    for kept, mask in zip(fast.kept(), data[f"{case['name']}.mask"], strict=True):
        assert kept.tolist() == mask.nonzero().squeeze(1).tolist()
