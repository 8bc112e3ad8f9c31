"""Real encoders, changed in a way that changes no number: they still convert, and are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenpass
from tests.fuzz.properties import compiled, leaves, require_same

SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 4
}  # fmt: skip

MODELS = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224")


class Before(nn.Module):
    """A module whose input takes a way round."""

    def __init__(self, inner: nn.Module, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.way = inner, way

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(self.way(x), *args, **kwargs)


def _unfused(model: Any) -> nn.Module:
    for block in model.blocks:
        block.attn.fused_attn = False
    return model  # type: ignore[no-any-return]


def _round(way: Callable[[Tensor], Tensor]) -> Callable[[Any], nn.Module]:
    def mutated(model: Any) -> nn.Module:
        model.blocks = nn.Sequential(*(Before(block, way) for block in model.blocks))
        return model  # type: ignore[no-any-return]

    return mutated


MUTATIONS: dict[str, Callable[[Any], nn.Module]] = {
    "written out": _unfused,
    "permuted and back": _round(lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
    "through float64": _round(lambda x: x.double().to(x.dtype)),
    "split and joined": _round(lambda x: torch.cat([x[:, :1], x[:, 1:]], 1)),
    "flat and back": _round(lambda x: x.flatten(0, 1).view(x.shape)),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_full_budget(name: str, mutation: str) -> None:
    """Breaks if a change of spelling costs the conversion, or the numbers."""
    torch.manual_seed(0)
    model = MUTATIONS[mutation](timm.create_model(name, **SIZES).eval())
    images = torch.randn(2, 3, 32, 32)
    fast = compiled(model, tokenpass.HiPrune(keep=1.0, dropped="merge"))
    with torch.no_grad():
        require_same(leaves(fast(images)), leaves(model(images)), f"{name} {mutation}")
        assert tokenpass.report(fast).converted
        assert len(tokenpass.report(fast).blocks) == SIZES["depth"]
