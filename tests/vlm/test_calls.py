"""A model is used as before: caches, beams, sampling, training, budgets, refusals."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import tokenpass
from tests.vlm.families import FAMILIES, images, prompts
from tests.vlm.models import IMAGE, PATCH, VIDEO
from tests.vlm.reference import full_positions, masked_logits, staying
from tokenpass import HiPrune, NothingRecordedError, OptionError
from tokenpass.visual_tokens import VisualTokens

SUPPRESSED: dict[str, Any] = {"suppress_tokens": [IMAGE, VIDEO]}

SOME = ["llava", "qwen2_vl", "gemma3"]
"""One family for each kind of positions and masks."""


@cache
def model_of(name: str) -> Any:
    return FAMILIES[name].build()


def stays(fast: Any, name: str, inputs: dict[str, Any], numbers: list[int]) -> torch.Tensor:
    return staying(inputs, fast.kept(), FAMILIES[name].pixels(numbers)[1])


@pytest.mark.parametrize("name", SOME)
def test_steps_with_a_cache(name: str) -> None:
    """Breaks if a step behind a cut prompt has another position, or a mask that does not fit."""
    model, numbers = model_of(name), [1, 2]
    inputs = prompts(FAMILIES[name], numbers)
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    token = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad():
        first = fast(**inputs)
        stay = stays(fast, name, inputs, numbers)
        longer = torch.cat((stay, torch.ones_like(token, dtype=torch.bool)), 1)
        mask = torch.cat((inputs["attention_mask"], torch.ones_like(token)), 1)
        typed = FAMILIES[name].typed
        step = {typed: torch.zeros_like(token)} if typed else {}
        found = fast(
            input_ids=token,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            **(step if name != "qwen2_vl" else {}),
        )
        full = {**inputs, "input_ids": torch.cat((inputs["input_ids"], token), 1)}
        full["attention_mask"] = longer.long()
        if typed:
            full[typed] = torch.cat((inputs[typed], torch.zeros_like(token)), 1)
        positions = full_positions(model, inputs)
        if positions is not None:
            more = positions[..., -1:] + torch.arange(1, 3)
            positions = torch.cat((positions, more), -1)
        expected = model(**full, position_ids=positions).logits[:, -2:]
    assert (found.logits - expected).abs().max() <= 1e-4


def test_padding_on_the_right() -> None:
    """Breaks if the padded side changes, or a step behind padding is counted from the padding."""
    model, numbers = model_of("llava"), [1, 2]
    inputs = prompts(FAMILIES["llava"], numbers)
    order = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name].gather(1, order)
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    token = torch.tensor([[5], [6]])
    with torch.no_grad():
        first = fast(**inputs)
        stay = stays(fast, "llava", inputs, numbers)
        for row, expected in zip(first.logits, masked_logits(model, inputs, stay), strict=True):
            assert (row[: len(expected)] - expected).abs().max() <= 1e-4
        mask = torch.cat((inputs["attention_mask"], torch.ones_like(token)), 1)
        found = fast(
            input_ids=token, past_key_values=first.past_key_values, attention_mask=mask
        ).logits
        full = {
            **inputs,
            "input_ids": torch.cat((inputs["input_ids"], token), 1),
            "attention_mask": torch.cat((stay.long(), torch.ones_like(token)), 1),
        }
        assert (found[:, -1] - model(**full).logits[:, -1]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", SOME)
def test_caches_beams_and_samples(name: str) -> None:
    """Breaks if a way of generating uses positions or features of other rows."""
    model, inputs = model_of(name), prompts(FAMILIES[name], [1, 2])
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, **SUPPRESSED}
    with torch.no_grad():
        expected = fast.generate(**inputs, **greedy)
        static = fast.generate(**inputs, **greedy, cache_implementation="static")
        assert torch.equal(static, expected)
        one_beam = fast.generate(**inputs, **greedy, num_beams=2, num_return_sequences=2)
        assert one_beam.shape[0] == 4
        assert torch.equal(one_beam[::2, :-6], inputs["input_ids"])
        best = fast.generate(**inputs, **greedy, num_beams=2)
        alone = [
            fast.generate(**prompts_alone(name, row), **greedy, num_beams=2)[0, -6:]
            for row in range(2)
        ]
        assert torch.equal(best[:, -6:], torch.stack(alone))
        torch.manual_seed(0)
        sampled = fast.generate(**inputs, max_new_tokens=6, do_sample=True, **SUPPRESSED)
        assert sampled.shape == expected.shape


def prompts_alone(name: str, row: int) -> dict[str, Any]:
    """One row of ``prompts(family, [1, 2])`` with its images."""
    inputs = prompts(FAMILIES[name], [1, 2])
    mine = slice(0, 1) if row == 0 else slice(1, 3)
    made = {}
    real = inputs["attention_mask"][row].bool()
    patches = [h * w for _, h, w in inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()]
    for key, value in inputs.items():
        if key == "pixel_values" and patches:
            made[key] = value.split(patches)[0] if row == 0 else torch.cat(value.split(patches)[1:])
        elif value.shape == inputs["input_ids"].shape:
            made[key] = value[row : row + 1, real]
        else:
            made[key] = value[mine]
    return made


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_compact_positions(name: str) -> None:
    """Breaks if positions have gaps: a prompt without them is the same to the model."""
    model, numbers = model_of(name), [1, 2]
    inputs = prompts(FAMILIES[name], numbers)
    fast = tokenpass.vlm(model, HiPrune(keep=0.3), positions="compact")
    with torch.no_grad():
        found = fast(**inputs).logits
        stay = stays(fast, name, inputs, numbers)
        made = {**inputs, "attention_mask": stay.long()}
        compact = (stay.long().cumsum(1) - 1).clamp(min=0)
        expected = model(**made, position_ids=compact).logits
    for row, mask, wanted in zip(found, stay, expected, strict=True):
        assert (row[-int(mask.sum()) :] - wanted[mask]).abs().max() <= 1e-4


def video_prompt(frames: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[2, 3, *[VIDEO] * tokens, 4, 5, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def kept_of_video(fast: Any, found: torch.Tensor, inputs: dict[str, Any], **more: Any) -> Any:
    """Kept tokens of the only video, whose logits must be those of the masked model."""
    kept = fast.kept("video")[0]
    visual = inputs["input_ids"] == VIDEO
    stay = torch.ones_like(visual)
    stay[visual] = torch.isin(torch.arange(int(visual.sum())), kept)
    expected = fast.model(**{**inputs, "attention_mask": stay.long(), **more}).logits[stay]
    assert (found[0] - expected).abs().max() <= 1e-4
    return kept


def test_video_packed() -> None:
    """Breaks if video tokens are cut by the image placeholder, or frames are one grid."""
    model = model_of("qwen2_vl")
    inputs = video_prompt(2, 2 * 12)
    inputs["pixel_values_videos"] = images(2 * 48, 3 * 2 * PATCH * PATCH)
    inputs["video_grid_thw"] = torch.tensor([[2, 6, 8]])
    inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == VIDEO).long()
    fast = tokenpass.vlm(model, HiPrune(keep=0.25))
    with torch.no_grad():
        found = fast(**inputs).logits
        positions = model.model.get_rope_index(
            inputs["input_ids"],
            video_grid_thw=inputs["video_grid_thw"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )[0]
        kept = kept_of_video(fast, found, inputs, position_ids=positions)
    assert len(kept) == 6
    with pytest.raises(NothingRecordedError, match="no image"):
        fast.kept()


def test_video_pooled() -> None:
    """Breaks if a frame whose patches are interpolated cannot be scored, or its end is dropped."""
    model = model_of("llava_onevision")
    inputs = video_prompt(2, 2 * 16 + 1)
    inputs["pixel_values_videos"] = images(1, 2, 3, 32, 32)
    fast = tokenpass.vlm(model, HiPrune(keep=0.25))
    with torch.no_grad():
        kept = kept_of_video(fast, fast(**inputs).logits, inputs)
    assert len(kept) == 9
    assert kept[-1] == 32


def test_labels_and_gradients() -> None:
    """Breaks if labels are cut elsewhere than prompts, or features lose their gradients."""
    model = model_of("llava")
    inputs = prompts(FAMILIES["llava"], [1, 1])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    weight = model.model.multi_modal_projector.linear_1.weight
    found = fast(**inputs, labels=labels, use_cache=False)
    (gradient,) = torch.autograd.grad(found.loss, weight)
    stay = stays(fast, "llava", inputs, [1, 1])
    logits = torch.stack(masked_logits(model, inputs, stay))
    wanted = torch.stack([row[mask] for row, mask in zip(labels, stay, strict=True)])
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
    (expected,) = torch.autograd.grad(loss, weight)
    assert (found.loss - loss).abs() <= 1e-5
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_budget_changes_between_calls() -> None:
    """Breaks if a budget is fixed when the model is made, or statistics are of another call."""
    fast = tokenpass.vlm(model_of("llava"), HiPrune(keep=0.5))
    inputs = prompts(FAMILIES["llava"], [2])
    with torch.no_grad():
        for keep, count in ((0.5, 32), (0.25, 16), (5, 5)):
            tokenpass.set_budget(fast, keep=keep)
            fast(**inputs)
            assert [len(kept) for kept in tokenpass.kept(fast)] == [count, count]
            stats = tokenpass.stats(fast)
            assert (stats.visual_tokens_before, stats.visual_tokens) == (128, 2 * count)
            assert stats.length_before - stats.length == 128 - 2 * count
            saved = 2 * 2 * 2 * 8 * 4 * (128 - 2 * count)
            assert stats.cache_bytes_saved == saved, "2 layers, keys and values, 2 heads of 8"


def test_reset_forgets() -> None:
    """Breaks if a budget or a call outlives a reset."""
    fast = tokenpass.vlm(model_of("llava"), HiPrune(keep=0.5))
    inputs = prompts(FAMILIES["llava"], [1])
    with torch.no_grad():
        tokenpass.set_budget(fast, keep=5)
        fast(**inputs)
        tokenpass.reset(fast)
        with pytest.raises(NothingRecordedError, match="call the model first"):
            tokenpass.kept(fast)
        fast(**inputs)
    assert [len(kept) for kept in tokenpass.kept(fast)] == [32]
    with pytest.raises(OptionError, match="threshold"):
        tokenpass.set_budget(fast, threshold=1.0)


def test_prefill_flops_are_those_of_the_language_model() -> None:
    """Breaks if the estimate leaves out layers or attention."""
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of("llava")
    fast = tokenpass.vlm(model, HiPrune(keep=0.5))
    inputs = prompts(FAMILIES["llava"], [1])
    embeds = torch.randn(1, inputs["input_ids"].shape[1], 32)
    with torch.no_grad():
        fast(**inputs)
        with FlopCounterMode(display=False) as counter:
            model.model.language_model(inputs_embeds=embeds)
    assert fast.stats().prefill_flops_before == counter.get_total_flops()


def hooks_of(model: nn.Module) -> int:
    found = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    everywhere = bool(nn.modules.module._has_any_global_hook())
    return sum(map(len, found)) + everywhere


def test_the_model_is_untouched() -> None:
    """Breaks if hooks, grad modes or weights are left behind."""
    model = FAMILIES["llava"].build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    inputs = prompts(FAMILIES["llava"], [1])
    with torch.inference_mode():
        expected = model(**inputs).logits
        hooks = hooks_of(model)
        assert not fast(**inputs).logits.requires_grad
        assert torch.equal(model(**inputs).logits, expected)
    assert fast.model is model
    assert fast.config is model.config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks_of(model) == hooks


def test_a_selector_of_the_user() -> None:
    """Breaks if a selector's tokens or features are not those that the language model is given."""

    def last_ones(tokens: VisualTokens, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.arange(len(tokens) - budget, len(tokens))
        return kept, 2 * tokens.features[kept]

    model = model_of("llava")
    fast = tokenpass.vlm(model, HiPrune(keep=4), selector=last_ones)
    inputs = prompts(FAMILIES["llava"], [1])
    with torch.no_grad():
        found = fast(**inputs)
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    assert fast.kept()[0].tolist() == [60, 61, 62, 63]
    assert (found.image_hidden_states - 2 * features[-4:]).abs().max() <= 1e-5


def text_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.vlm.models import text

    return LlamaForCausalLM(LlamaConfig(**text()))


def test_refusals_name_what_is_missing() -> None:
    """Breaks if a model that does not fit is taken, or the message does not help."""
    with pytest.raises(OptionError, match="forward takes no mm_encoder_outputs"):
        tokenpass.vlm(text_model())
    with pytest.raises(OptionError, match="a vision-language model with a config"):
        tokenpass.vlm(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="positions='near'"):
        tokenpass.vlm(model_of("llava"), positions="near")  # type: ignore[arg-type]
    fast = tokenpass.vlm(model_of("llava"), HiPrune(keep=0.5))
    with pytest.raises(NothingRecordedError, match="call the model first"):
        fast.stats()
    inputs = prompts(FAMILIES["llava"], [1])
    with pytest.raises(OptionError, match="use_cache=False"):
        fast.generate(**inputs, use_cache=False, max_new_tokens=2)
    with pytest.raises(OptionError, match="pass input_ids"):
        fast(pixel_values=inputs["pixel_values"], inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(OptionError, match="64 visual tokens"):
        fast(input_ids=inputs["input_ids"][:, :40], pixel_values=inputs["pixel_values"])
    with pytest.raises(OptionError, match=r"attention_mask must be \(B, L\)"):
        fast(**{**inputs, "attention_mask": torch.ones(1, 1, 4, 4)})
    too_deep = tokenpass.vlm(model_of("llava"), HiPrune(keep=0.5, deep_layer=4))
    with pytest.raises(OptionError, match="first 3 of 4 attention layers"):
        too_deep(**inputs)
