"""What a shorter prompt must compute: the full model, with the dropped tokens masked out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.vlm.models import IMAGE, VIDEO


def staying(inputs: Mapping[str, Any], kept: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Which tokens of the full prompts are neither padding nor dropped, ``(B, L)``, bool.

    Args:
        inputs: Of the model; prompts in ``input_ids``.
        kept: For each image the visual tokens that stay.
        counts: For each image all its visual tokens.
    """
    visual = [torch.isin(torch.arange(n), k) for n, k in zip(counts, kept, strict=True)]
    mask: Tensor = inputs["attention_mask"].bool().clone()
    mask[inputs["input_ids"] == IMAGE] = torch.cat(visual)
    return mask


def full_positions(model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Positions that the full prompt has in ``forward``; ``None`` where the model counts."""
    rope_index = getattr(model.model, "get_rope_index", None)
    if rope_index is None or "image_grid_thw" not in inputs:
        return None
    positions: Tensor = rope_index(
        inputs["input_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
    )[0]
    return positions


def masked_logits(model: Any, inputs: Mapping[str, Any], stay: Tensor) -> list[Tensor]:
    """Logits of the full model, which attends to tokens in ``stay`` only, at those tokens."""
    made = {**inputs, "attention_mask": stay.long()}
    logits = model(**made, position_ids=full_positions(model, inputs)).logits
    return [row[mask] for row, mask in zip(logits, stay, strict=True)]


def masked_greedy(model: Any, inputs: Mapping[str, Any], stay: Tensor, steps: int) -> Tensor:
    """Tokens that the full model chooses greedily where it attends to ``stay`` only.

    Placeholders are never chosen. Without a cache: every step runs on the whole sequence.
    Positions are those of generation, where padding on the left does not count.
    """
    grown = {name: value for name, value in inputs.items() if name != "position_ids"}
    mask = stay.long()
    positions = model._prepare_position_ids_for_generation(
        inputs["input_ids"], {k: v for k, v in inputs.items() if k != "input_ids"}
    )
    if positions.dim() == 2 and hasattr(model.config, "image_token_index"):
        positions = positions + _first_position(model)
    shape = inputs["input_ids"].shape
    for _ in range(steps):
        made = {**grown, "attention_mask": mask, "position_ids": positions}
        logits = model(**made, use_cache=False).logits[:, -1:]
        logits[..., [IMAGE, VIDEO]] = -torch.inf
        token = logits.argmax(-1)
        for name, value in grown.items():
            if value.shape[-2:] == shape:
                more = token if name == "input_ids" else value[:, -1:]
                grown[name] = torch.cat((value, more), -1)
        shape = grown["input_ids"].shape
        mask = torch.cat((mask, torch.ones_like(token)), 1)
        positions = torch.cat((positions, positions[..., -1:] + 1), -1)
    sequences: Tensor = grown["input_ids"]
    return sequences[:, -steps:]


def _first_position(model: Any) -> int:
    """Position of the first token: models that count from one say so in their inputs."""
    made = model.prepare_inputs_for_generation(
        torch.ones(1, 1, dtype=torch.int64), position_ids=torch.zeros(1, 1, dtype=torch.int64)
    )
    return int(made["position_ids"][0, 0])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))
