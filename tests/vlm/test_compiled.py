"""A compiled language model behind an encoder that is watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import tokenpass
from tests.vlm.families import FAMILIES, prompts
from tokenpass import HiPrune


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_budgets_compile_nothing(name: str) -> None:
    """Breaks if a length is a constant of the compiled graph, or the numbers are others."""
    compiled: list[fx.GraphModule] = []

    def counting(graph: fx.GraphModule, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model, inputs = FAMILIES[name].build(), prompts(FAMILIES[name], [1, 2])
    plain = tokenpass.vlm(model, HiPrune(keep=0.5))
    fast = tokenpass.vlm(model, HiPrune(keep=0.5), inner=counting)
    counts = []
    with torch.no_grad():
        for keep in (0.5, 0.3, 0.2, 0.6):
            for one in (plain, fast):
                tokenpass.set_budget(one, keep=keep)
            assert (fast(**inputs).logits - plain(**inputs).logits).abs().max() <= 1e-5
            counts.append(len(compiled))
        greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        found, expected = (one.generate(**inputs, **greedy) for one in (fast, plain))
    assert torch.equal(found, expected)
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 3
    assert not any("forward" in module.__dict__ for module in model.modules())
