"""Norms over channels are found, as operators and written out; norms over tokens are not.

Breaks if the affine part is left out of a match, or if a reduction over tokens passes for a norm.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests import tiny
from tests.captured import trace
from tests.tiny import WIDTH

EPS = 1e-6


class Spelled(nn.Module):
    def __init__(self, function: Callable[[Spelled, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.bias = nn.Parameter(torch.rand(WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def written_out(m: Spelled, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS) * m.weight + m.bias


def with_variance(m: Spelled, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return m.weight * ((x - mean) * torch.rsqrt(variance + EPS)) + m.bias


def rms(m: Spelled, x: Tensor) -> Tensor:
    return m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def rms_in_float32(m: Spelled, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return m.weight * scaled.to(x.dtype)


def channels_first(m: Spelled, x: Tensor) -> Tensor:
    return functional.group_norm(x.flatten(0, 1), 1, m.weight, m.bias).reshape(x.shape)


NORMS: dict[str, Callable[[Spelled, Tensor], Tensor]] = {
    "layer norm": lambda m, x: functional.layer_norm(x, (WIDTH,), m.weight, m.bias),
    "layer norm without affine part": lambda m, x: functional.layer_norm(x, (WIDTH,)),
    "rms norm": lambda m, x: functional.rms_norm(x, (WIDTH,), m.weight),
    "written out": written_out,
    "with variance": lambda m, x: with_variance(m, x),
    "root mean square": rms,
    "vector norm": lambda m, x: functional.normalize(x, dim=-1) * m.weight,
}


@pytest.mark.parametrize("name", NORMS)
def test_spelling(name: str) -> None:
    """The match starts at the stream and ends at what the next layer reads."""
    model = tiny.Encoder([tiny.Block(norm=lambda: Spelled(NORMS[name]))])
    traced = trace(model, tiny.images())
    found = traced.found
    (block,) = found.blocks
    first, second = found.norms
    assert (first.input, second.input) == (block.residuals[0].skip, block.residuals[0].out)
    assert second.out is block.mlps[0].input
    values = traced.values()
    norm = model.blocks[0].get_submodule("norm2")
    expected = norm(values[second.input])
    assert torch.allclose(values[second.out], expected, rtol=0, atol=1e-6)


def test_float32_inside_bfloat16() -> None:
    model = tiny.Encoder([tiny.Block(norm=lambda: Spelled(rms_in_float32))]).bfloat16()
    found = trace(model, tiny.images(dtype=torch.bfloat16)).found
    assert [norm.input for norm in found.norms] == [
        found.blocks[0].residuals[0].skip,
        found.blocks[0].residuals[0].out,
    ]
    assert found.norms[1].out is found.blocks[0].mlps[0].input


def test_norm_modules() -> None:
    for make in (lambda: nn.LayerNorm(WIDTH), lambda: nn.RMSNorm(WIDTH)):
        found = trace(tiny.Encoder([tiny.Block(norm=make)]), tiny.images()).found
        assert len(found.norms) == 2


def test_norms_of_queries_and_keys() -> None:
    class Normed(tiny.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (functional.layer_norm(x, x.shape[-1:]) for x in (q, k))
            return functional.scaled_dot_product_attention(q, k, v)

    found = trace(tiny.encoder(Normed, depth=1), tiny.images()).found
    assert len(found.norms) == 4
    outs = [norm.out for norm in found.norms]
    assert found.over_grid[0].query in outs
    assert found.over_grid[0].key in outs


OTHERS: dict[str, Callable[[Spelled, Tensor], Tensor]] = {
    "over tokens": lambda m, x: functional.layer_norm(x.mT, x.shape[1:2]).mT,
    "over tokens and channels": lambda m, x: functional.layer_norm(x, x.shape[1:]),
    "standardised over tokens": lambda m, x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
    "standardised over the batch": lambda m, x: x - x.mean(0, keepdim=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_norms_of_other_axes(name: str) -> None:
    model = tiny.Encoder([tiny.Block(norm=lambda: Spelled(OTHERS[name]))])
    found = trace(model, tiny.images()).found
    assert not found.norms
