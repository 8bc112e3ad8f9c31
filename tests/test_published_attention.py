"""The published forms of attention where keys are fewer than queries, or have fewer heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenpass
from tests import tiny
from tests.zoo import relative_error

TOLERANCE = 1e-5
"""Of float32, relative to the largest output."""
SIDE = tiny.SIDE // tiny.PATCH


class GroupedHeads(tiny.Attention):
    """Four heads of queries, two of keys and values."""

    def __init__(self) -> None:
        super().__init__(heads=4)
        self.qkv = nn.Linear(tiny.WIDTH, 2 * tiny.WIDTH)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (8, -1)).transpose(1, 2).split((4, 2, 2), 1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class PooledKeys(tiny.Attention):
    """Keys and values of cells of the grid, by a layer that makes one row of each.

    Args:
        pool: From ``(B, C, H, W)`` to ``(B, C, H', W')``.
    """

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return q, self.pooled(k), self.pooled(v)

    def pooled(self, x: Tensor) -> Tensor:
        grid = x.transpose(2, 3).flatten(1, 2).unflatten(-1, (SIDE, SIDE))
        cells = self.pool(grid).flatten(2).transpose(1, 2)
        out: Tensor = cells.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
        return out


class Turned(nn.Module):
    """Columns before rows: ``(B, C, H, W)`` to ``(B, C, W, H)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3)


def stream(attention: str, part: tiny.Part, keep: float) -> tuple[Any, nn.Module]:
    """A compiled encoder without class token, and the encoder."""
    torch.manual_seed(0)
    model = tiny.Encoder([tiny.Block(part), tiny.Block(part)], prefix=0)
    method = tokenpass.Eventful(keep=keep, attention=attention, scene_cut=None)  # type: ignore[arg-type]
    backend = tokenpass.backend(method, inner="eager", always_rewrite=True)
    return torch.compile(model, backend=backend, dynamic=False), model


def largest_error(fast: Any, model: Any) -> float:
    """Over a few frames in which some tokens of two images change."""
    x, errors = tiny.images(), []
    for frame in range(4):
        errors.append(relative_error(fast(x), model(x)))
        x[:, :, frame : frame + 3] += 0.3
    return max(errors)


KEYS: dict[str, tiny.Part] = {
    "grouped heads": GroupedHeads,
    "averages": lambda: PooledKeys(nn.AvgPool2d(2)),
    "wide cells": lambda: PooledKeys(nn.MaxPool2d((1, 2))),
    "columns first": lambda: PooledKeys(nn.Sequential(nn.AvgPool2d((2, 1)), Turned())),
    "a strided convolution": lambda: PooledKeys(nn.Conv2d(8, 8, 2, stride=2)),
}
each_key = pytest.mark.parametrize("keys", KEYS)
each_form = pytest.mark.parametrize("form", ["scores", "delta"])


@each_key
@each_form
@torch.no_grad()
def test_full_budget_is_the_dense_model(form: str, keys: str) -> None:
    """Breaks if a key is remembered that a token has changed, or is taken for another cell's."""
    fast, model = stream(form, KEYS[keys], 1.0)
    assert largest_error(fast, model) <= TOLERANCE
    assert not tokenpass.report(fast).refusals


@each_key
@torch.no_grad()
def test_buffered_scores_are_exact(keys: str) -> None:
    """Breaks if a column of the scores is not renewed when a token of its cell is updated."""
    buffered, _ = stream("scores", KEYS[keys], 0.25)
    dense, _ = stream("none", KEYS[keys], 0.25)
    assert largest_error(buffered, dense) <= TOLERANCE


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.MaxPool2d(3),
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 1), nn.AvgPool2d(2)),
        nn.AdaptiveAvgPool2d(2),
    ],
    ids=str,
)
@torch.no_grad()
def test_other_pooling_stays_dense(pool: nn.Module) -> None:
    """Breaks if a token is thought to have one key where it has several, or none."""
    fast, model = stream("scores", lambda: PooledKeys(pool), 1.0)
    assert largest_error(fast, model) <= TOLERANCE
    assert all("stays dense" in item.reason for item in tokenpass.report(fast).refusals)
    assert len(tokenpass.report(fast).refusals) == 2
