"""Families that the code was not written with, and one that it must refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tokenpass
from tests.vlm import further_models as models
from tests.vlm.families import FAMILIES, Family, images, prompts
from tests.vlm.models import PATCH
from tests.vlm.reference import masked_logits, staying
from tokenpass import HiPrune, TokenpassError


def _merged(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    grids = torch.tensor([[1, 6, 8]] * sum(numbers))
    return {
        "pixel_values": images(48 * sum(numbers), 3 * PATCH * PATCH),
        "image_grid_thw": grids,
        "image_merge_sizes": torch.tensor([2] * sum(numbers)),
    }, [12] * sum(numbers)


def _flexible(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    count = sum(numbers)
    return {
        "pixel_values": images(count, 64, 3 * PATCH * PATCH),
        "spatial_shapes": torch.tensor([[8, 8]] * count),
        "pixel_attention_mask": torch.ones(count, 64, dtype=torch.int64),
    }, [16] * count


FURTHER: dict[str, Family] = {
    "vipllava": Family(models.vipllava, FAMILIES["llava"].pixels),
    "aya_vision": Family(models.aya_vision, FAMILIES["internvl"].pixels),
    "glm4v": Family(models.glm4v, FAMILIES["qwen2_vl"].pixels, "mm_token_type_ids"),
    "qwen3_5": Family(models.qwen3_5, FAMILIES["qwen3_vl"].pixels, "mm_token_type_ids"),
    "video_llama_3": Family(models.video_llama_3, _merged),
    "lfm2_vl": Family(models.lfm2_vl, _flexible),
    "janus": Family(models.janus, FAMILIES["llava"].pixels),
}


@pytest.mark.parametrize("name", FURTHER)
def test_logits_equal_the_masked_model(name: str) -> None:
    """Breaks if something is taken for granted that only the families of the list have."""
    family, numbers = FURTHER[name], [1, 0, 2]
    model, inputs = family.build(), prompts(family, numbers)
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    with torch.no_grad():
        found = fast(**inputs).logits
        stay = staying(inputs, fast.kept(), family.pixels(numbers)[1])
        for row, expected in zip(found, masked_logits(model, inputs, stay), strict=True):
            assert (row[-len(expected) :] - expected).abs().max() <= 1e-4


def test_resamplers_are_refused() -> None:
    """Breaks if tokens are ranked by attention that has nothing to do with them."""
    family = Family(models.blip_2, lambda numbers: ({"pixel_values": images(1, 3, 32, 32)}, [8]))
    fast = tokenpass.vlm(family.build(), HiPrune(keep=0.3))
    with torch.no_grad(), pytest.raises(TokenpassError, match="resampler"):
        fast(**prompts(family, [1]))
