"""Every family against the full model with the dropped tokens masked out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch

import tokenpass
from tests.vlm.families import FAMILIES, prompts
from tests.vlm.models import IMAGE, VIDEO
from tests.vlm.reference import masked_greedy, masked_logits, staying
from tokenpass import HiPrune

BATCHES = [[1], [2], [1, 0, 2], [0]]
"""Images of each prompt of a batch."""

TOLERANCE = 1e-4

STEPS = 20

GREEDY: dict[str, Any] = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "suppress_tokens": [IMAGE, VIDEO],
}


@cache
def model_of(name: str) -> Any:
    return FAMILIES[name].build()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def counts_of(name: str, numbers: Sequence[int]) -> list[int]:
    return FAMILIES[name].pixels(numbers)[1]


each = pytest.mark.parametrize("name", FAMILIES)


def kept_by_image(fast: Any, counts: Sequence[int]) -> list[torch.Tensor]:
    """Kept tokens of each image, also where one entry holds all images of a prompt."""
    sizes = iter(counts)
    found = []
    for kept in fast.kept():
        rest = kept
        while len(rest):
            size = next(sizes)
            found.append(rest[rest < size])
            rest = rest[rest >= size] - size
    return found


@each
@pytest.mark.parametrize("numbers", BATCHES, ids=str)
def test_logits_equal_the_masked_model(name: str, numbers: list[int]) -> None:
    """Breaks if another token is dropped than is said, or positions or features are mixed up."""
    model, inputs = model_of(name), prompts(FAMILIES[name], numbers)
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    found = fast(**inputs)
    if not any(numbers):
        assert torch.equal(found.logits, model(**inputs).logits)
        return
    stay = staying(inputs, kept_by_image(fast, counts_of(name, numbers)), counts_of(name, numbers))
    assert found.logits.shape[1] == int(stay.sum(1).max()) < inputs["input_ids"].shape[1]
    for row, expected in zip(found.logits, masked_logits(model, inputs, stay), strict=True):
        assert (row[-len(expected) :] - expected).abs().max() <= TOLERANCE
        assert expected.std() > 0.1, "logits that do not depend on anything prove nothing"


@each
@pytest.mark.parametrize("keep", [1.0, 10**6], ids=["untouched", "nothing to drop"])
def test_full_budget_equals_the_model(name: str, keep: float) -> None:
    """Breaks if running the encoder apart, or passing positions, changes anything."""
    model, inputs = model_of(name), prompts(FAMILIES[name], [1, 0, 2])
    fast = tokenpass.vlm(model, HiPrune(keep=keep))
    assert (fast(**inputs).logits - model(**inputs).logits).abs().max() <= 1e-5
    assert torch.equal(fast.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


@each
def test_greedy_generation_equals_the_masked_model(name: str) -> None:
    """Breaks if a cached step has another position, or attends to what was dropped."""
    model, numbers = model_of(name), [1, 0, 2]
    inputs = prompts(FAMILIES[name], numbers)
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    found = fast.generate(**inputs, **GREEDY)
    assert torch.equal(found[:, :-STEPS], inputs["input_ids"])
    counts = counts_of(name, numbers)
    stay = staying(inputs, kept_by_image(fast, counts), counts)
    assert torch.equal(found[:, -STEPS:], masked_greedy(model, inputs, stay, STEPS))
