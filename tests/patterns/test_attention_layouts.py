"""Attention is found whatever projects queries, keys and values, and whatever module wraps it.

Breaks if a way to split a joint projection hides the token axis, or if a module that PyTorch
computes with a fused fast path in eval mode is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests import tiny
from tests.captured import trace
from tests.tiny import HEADS, WIDTH

Split = Callable[[Tensor], tuple[Tensor, ...] | list[Tensor]]


def by_heads(x: Tensor) -> Tensor:
    """``(B, N, heads * d)`` as ``(B, heads, N, d)``."""
    return x.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)


JOINT: dict[str, Split] = {
    "chunk": lambda x: [by_heads(y) for y in x.chunk(3, dim=-1)],
    "split": lambda x: [by_heads(y) for y in x.split(WIDTH, dim=-1)],
    "split by sizes": lambda x: [by_heads(y) for y in x.split([WIDTH, WIDTH, WIDTH], -1)],
    "tensor split": lambda x: [by_heads(y) for y in torch.tensor_split(x, 3, dim=-1)],
    "slices": lambda x: [
        by_heads(x[..., start : start + WIDTH]) for start in range(0, 3 * WIDTH, WIDTH)
    ],
    "narrow": lambda x: [by_heads(x.narrow(2, s, WIDTH)) for s in range(0, 3 * WIDTH, WIDTH)],
    "unbind": lambda x: x.reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0),
    "indices": lambda x: list(x.view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)),
    "select": lambda x: [
        x.unflatten(-1, (3, HEADS, -1))[:, :, place].transpose(1, 2) for place in range(3)
    ],
    "heads outermost": lambda x: (
        x.unflatten(-1, (HEADS, 3, -1)).movedim(3, 0).transpose(2, 3).unbind(0)
    ),
    "heads outermost, chunk": lambda x: x.unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1),
    "values widest": lambda x: [by_heads(y) for y in x.split([4, 4, 3 * WIDTH - 8], -1)],
    "tokens first": lambda x: [
        y.reshape(y.shape[0], y.shape[1] * HEADS, -1).permute(1, 0, 2).unflatten(0, (-1, HEADS))
        for y in x.transpose(0, 1).chunk(3, -1)
    ],
}


class Joint(nn.Module):
    def __init__(self, split: Split) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        if q.shape[0] == x.shape[1]:
            q, k, v = (y.transpose(0, 1).transpose(0, 2).transpose(0, 1) for y in (q, k, v))
            q, k, v = (y.permute(1, 0, 2, 3) if y.shape[0] == HEADS else y for y in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out[..., :WIDTH]


@pytest.mark.parametrize("name", JOINT)
def test_joint_projection(name: str) -> None:
    found = trace(tiny.encoder(lambda: Joint(JOINT[name]), depth=1), tiny.images()).found
    assert (len(found.over_grid), len(found.blocks)) == (1, 1), list(map(str, found.misses))


class Separate(tiny.Attention):
    """Three projections, keys without bias as in BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (by_heads(layer(x)) for layer in (self.q, self.k, self.v))
        return q, k, v


class Rotated(tiny.Attention):
    """Rotary embedding of queries and keys, the prefix token left out."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return self.rotated(q), self.rotated(k), v

    def rotated(self, x: Tensor) -> Tensor:
        count, width = x.shape[2] - 1, x.shape[3]
        angle = torch.arange(count).outer(torch.arange(1.0, width // 2 + 1)).repeat(1, 2)
        first, second = x[:, :, 1:].chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return torch.cat([x[:, :, :1], x[:, :, 1:] * angle.cos() + turned * angle.sin()], 2)


class Torch(nn.Module):
    """``nn.MultiheadAttention``."""

    def __init__(self, weights: bool, batch_first: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=batch_first)
        self.weights = weights
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        out: Tensor = self.inner(x, x, x, need_weights=self.weights)[0]
        return out if self.batch_first else out.transpose(0, 1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "separate": Separate,
    "rotary": Rotated,
    "nn.MultiheadAttention": lambda: Torch(False, True),
    "nn.MultiheadAttention with weights": lambda: Torch(True, True),
    "nn.MultiheadAttention, tokens first": lambda: Torch(False, False),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str) -> None:
    found = trace(tiny.encoder(MODULES[name]), tiny.images()).found
    assert (len(found.over_grid), len(found.blocks), len(found.mlps)) == (2, 2, 2)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_layer(norm_first: bool, activation: str) -> None:
    """In eval mode without gradients this module calls one fused operator."""
    options: dict[str, Any] = {"batch_first": True, "norm_first": norm_first}
    layers = [
        nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, activation=activation, **options)
        for _ in range(2)
    ]
    found = trace(tiny.Encoder(layers), tiny.images()).found
    assert (len(found.over_grid), len(found.blocks), len(found.mlps)) == (2, 2, 2)


def test_shared_weights_are_found_twice() -> None:
    """Breaks if a match is remembered by its parameters or by its module."""
    block = tiny.Block()
    found = trace(tiny.Encoder([block, block]), tiny.images()).found
    assert len(found.over_grid) == len(found.blocks) == len(found.mlps) == 2
    first, second = found.blocks
    assert first.attention.softmax is not second.attention.softmax
    assert first.out in (second.residuals[0].skip, second.residuals[0].root)


def test_two_attentions_side_by_side() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = tiny.Attention(), tiny.Attention()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.first(x) + self.second(x)
            return out

    found = trace(tiny.encoder(Both, depth=1), tiny.images()).found
    (block,) = found.blocks
    assert len(block.attentions) == len(found.over_grid) == 2
