"""Further images behind a prompt that was cut, whose keys and values are at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenpass
from tests.vlm.families import FAMILIES, prompts
from tests.vlm.reference import masked_logits, staying
from tokenpass import HiPrune, OptionError
from tokenpass.visual_tokens import VisualTokens


def joined(first: dict[str, Tensor], then: dict[str, Tensor]) -> dict[str, Tensor]:
    """One prompt made of two."""
    along = first["input_ids"].shape
    return {
        name: torch.cat((first[name], then[name]), 1 if first[name].shape == along else 0)
        for name in first
    }


def turns(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return prompts(FAMILIES[name], [1]), prompts(FAMILIES[name], [1], seed=1)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_vl"])
def test_images_behind_a_cache(name: str, positions: Any) -> None:
    """Breaks if later images are positioned or masked as if the prompt had not been cut."""
    model, (first, then) = FAMILIES[name].build(), turns(name)
    fast = tokenpass.vlm(model, HiPrune(keep=0.3), positions=positions)
    after = {"input_ids": torch.tensor([[5, 6]])}
    with torch.no_grad():
        found = fast(**first)
        kept = fast.kept()
        mask = torch.cat((first["attention_mask"], then["attention_mask"]), 1)
        cache = found.past_key_values
        second = fast(**{**then, "attention_mask": mask}, past_key_values=cache)
        kept += fast.kept()
        third = fast(**after, past_key_values=cache)
        full = joined(first, then)
        counts = FAMILIES[name].pixels([1])[1] * 2
        stay = staying(full, kept, counts)
        if positions == "original":
            (expected,) = masked_logits(model, full, stay)
        else:
            compact = (stay.long().cumsum(1) - 1).clamp(min=0)
            masked = {**full, "attention_mask": stay.long(), "position_ids": compact}
            expected = model(**masked).logits[stay]
    length = second.logits.shape[1]
    assert (second.logits[0] - expected[-length:]).abs().max() <= 1e-4
    assert third.logits.shape[1] == 2


def test_steps_without_a_mask() -> None:
    """Breaks if padding that a cut made is attended to where the prompts had none."""
    model, inputs = FAMILIES["llava"].build(), prompts(FAMILIES["llava"], [1, 1])
    sizes = iter([9, 4])

    def fewer(tokens: VisualTokens, budget: int) -> Tensor:
        return torch.arange(next(sizes))

    fast = tokenpass.vlm(model, HiPrune(keep=0.3), selector=fewer)
    token = torch.tensor([[5], [6]])
    mask = inputs.pop("attention_mask")
    assert mask.all()
    with torch.no_grad():
        first = fast(**inputs)
        found = fast(input_ids=token, past_key_values=first.past_key_values).logits
        given = {**inputs, "attention_mask": mask}
        stay = staying(given, fast.kept(), FAMILIES["llava"].pixels([1, 1])[1])
        full = torch.cat((inputs["input_ids"], token), 1)
        longer = torch.cat((stay, torch.ones_like(token, dtype=torch.bool)), 1).long()
        expected = model(**{**inputs, "input_ids": full, "attention_mask": longer}).logits
    assert (found[:, -1] - expected[:, -1]).abs().max() <= 1e-4


def test_caches_of_others_are_refused() -> None:
    """Breaks if a cache that nothing is known of is taken for that of a cut prompt."""
    model, (first, then) = FAMILIES["llava"].build(), turns("llava")
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    with torch.no_grad():
        cache = model(**first).past_key_values
        with pytest.raises(OptionError, match="of another call"):
            fast(**then, past_key_values=cache)
