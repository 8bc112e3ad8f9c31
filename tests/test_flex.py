"""``flex_attention`` that neither changes scores nor hides keys is attention like any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tokenpass
from tests.zoo import relative_error

HEADS, WIDTH, SIDE, PATCH = 2, 32, 16, 4


def unchanged(score: Tensor, *places: Tensor) -> Tensor:
    return score


def nearer(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score - 0.1 * (query - key).abs()


def earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


class Encoder(nn.Module):
    """Two blocks whose attention is ``flex_attention`` with the given options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.joint = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.options = options

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.embed(images).flatten(2).transpose(1, 2)
        for joint, out in zip(self.joint, self.out, strict=True):
            q, k, v = joint(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            attended = flex_attention(q, k, v, **self.options)
            assert isinstance(attended, Tensor)
            x = x + out(attended.transpose(1, 2).flatten(2))
        return x


IMAGES = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def both(model: nn.Module) -> tuple[Any, float]:
    """The compiled model at full budget, and its error relative to the fused operator's."""
    backend = tokenpass.backend(
        tokenpass.HiPrune(keep=1.0, dropped="discard"), inner="eager", always_rewrite=True
    )
    fast = torch.compile(model, backend=backend, dynamic=False)
    return fast, relative_error(fast(IMAGES), torch.compile(model, backend="eager")(IMAGES))


@pytest.mark.slow
@torch.no_grad()
def test_plain_flex_attention_is_pruned() -> None:
    """Breaks if attention without a score function is left as it is, or loses its scale."""
    for options in ({}, {"score_mod": unchanged}, {"scale": 0.2}):
        fast, error = both(Encoder(**options))
        assert error < 1e-5
        report = tokenpass.report(fast)
        assert report.converted
        assert len(report.attentions) == 2
        tokenpass.set_budget(fast, keep=4)
        fast(IMAGES)
        assert tokenpass.kept(fast).shape == (2, 4)


@pytest.mark.slow
@torch.no_grad()
def test_scores_that_are_changed_and_keys_that_are_hidden_are_left() -> None:
    """Breaks if a score function or a mask is dropped."""
    tokens = (SIDE // PATCH) ** 2
    mask = create_block_mask(earlier, None, None, tokens, tokens, device="cpu")
    for options in ({"score_mod": nearer}, {"block_mask": mask}):
        fast, error = both(Encoder(**options))
        assert error < 1e-5
        assert not tokenpass.report(fast).attentions
