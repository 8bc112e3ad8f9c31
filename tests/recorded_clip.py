"""The CLIP tower of the recorded selections: weights and configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

DATA = Path(__file__).resolve().parents[2] / "shared" / "oracle" / "hiprune"

PREFIX = "model.vision_model."


def config() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
    )


def weights(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's own weights among what was recorded."""
    return {n.removeprefix(PREFIX): x for n, x in data.items() if n.startswith(PREFIX)}


def pixels(case: dict[str, Any], data: dict[str, Tensor]) -> Tensor:
    """Images of a case, ``(B, 3, 336, 336)``."""
    first, stop = case["images"]
    return (data["pixels_uint8"][first:stop] / 255 - 0.5) * 6


def recorded(name: str) -> list[dict[str, Any]]:
    """The cases of one recording; none where there is no data."""
    path = DATA / f"{name}_cases.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["cases"] if path.is_file() else []
    return found
