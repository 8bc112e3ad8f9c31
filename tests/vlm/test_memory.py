"""Choosing among many visual tokens holds no attention map."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house.test_layers import ROOT

SIDE = 128
"""Patches along a side: 16,384 of them, and one attention map of a head would take 1 GB."""

LIMIT_MB = 200

SCRIPT = f"""
import resource
import torch
import tests.conftest
import tokenpass
from tests.vlm.models import IMAGE, spread, text, tower
from tokenpass import HiPrune
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

torch.set_num_threads(1)
side, sizes = {SIDE}, dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, patch_size=2)
vision = CLIPVisionConfig(**tower(**sizes, image_size=2 * side))
words = LlamaConfig(**text(max_position_embeddings=side * side))
config = LlavaConfig(vision_config=vision, text_config=words, image_token_id=IMAGE)
config.vision_feature_layer = -1
model = spread(LlavaForConditionalGeneration(config))
ids = torch.tensor([[1, *[IMAGE] * side * side, 2]])
inputs = {{"input_ids": ids, "pixel_values": torch.randn(1, 3, 2 * side, 2 * side)}}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

fast = tokenpass.vlm(model, HiPrune(keep=64))
with torch.no_grad():
    model.model.get_image_features(inputs["pixel_values"])
    before = peak()
    for _ in range(2):
        fast(**inputs)
        assert [len(kept) for kept in fast.kept()] == [64]
        print(peak() - before)
"""


@pytest.mark.slow
def test_scoring_needs_little_memory() -> None:
    """Breaks if scores, or what visual tokens are made of, are computed from a whole map."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, later = map(int, run.stdout.split())
    assert first <= later <= LIMIT_MB
