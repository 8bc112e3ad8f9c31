"""What an image is: each has a budget of its own, also where an encoder returns them as one."""

from __future__ import annotations

import pytest
import torch

import tokenpass
from tests.vlm.families import FAMILIES, prompts
from tests.vlm.models import IMAGE
from tokenpass import HiPrune
from tokenpass.prompts import runs_of


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_images_of_a_prompt_have_their_own_budgets(name: str) -> None:
    """Breaks if one image's tokens are dropped for those of another of the same prompt."""
    model, inputs = FAMILIES[name].build(), prompts(FAMILIES[name], [1, 0, 2])
    fast = tokenpass.vlm(model, HiPrune(keep=7, alpha=0.6))
    alone = prompts(FAMILIES[name], [1])
    with torch.no_grad():
        for _ in range(2):
            fast(**inputs)
            kept = tokenpass.kept(fast)
            assert [len(one) for one in kept] == [7, 7, 7]
        pictures = [inputs["pixel_values"][row, place] for row, place in ((0, 0), (2, 0), (2, 1))]
        for picture, mine in zip(pictures, kept, strict=True):
            fast(**{**alone, "pixel_values": picture[None, None]})
            assert torch.equal(tokenpass.kept(fast)[0], mine)


def test_runs_of_placeholders() -> None:
    """Breaks if runs reach over the end of a prompt, or the entries' borders are forgotten."""
    ids = torch.tensor([[1, IMAGE, IMAGE, 2, IMAGE], [IMAGE, 3, IMAGE, IMAGE, 4]])
    assert runs_of(ids, IMAGE, [3, 0, 3]) == [[2, 1], [], [1, 2]]
    assert runs_of(ids, IMAGE, [1, 1, 4]) == [[1], [1], [1, 1, 2]]
    assert runs_of(ids, IMAGE, [5]) == [[5]]
