"""One attention whose tokens change from frame to frame, and dense attention in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from tokenpass import attention_rows, exchange_cost, incremental, native, running_softmax
from tokenpass.incremental import full_attention, update_attention

WAYS = ("fused", "in blocks", "by code")
"""How attention is updated: by operations for a compiler to fuse, or by compiled code."""


@contextmanager
def updating(way: str) -> Iterator[None]:
    """Updates in one of the ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incremental, "SCORE_BYTES", 0 if way == "in blocks" else 2**40)
        if way != "by code":
            patch.setattr(native, "available", lambda *tensors: False)
        yield


@contextmanager
def exchanging(way: str = "fused", block_bytes: int = 2**24) -> Iterator[None]:
    """The same, however few tokens there are."""
    with updating(way), pytest.MonkeyPatch.context() as patch:
        for module in (exchange_cost, incremental):
            patch.setattr(module, "pays", lambda tokens, changed, compiled: True)
        patch.setattr(running_softmax, "BLOCK_BYTES", block_bytes)
        patch.setattr(attention_rows, "BLOCK_BYTES", block_bytes)
        yield


def dense(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Softmax attention in float64; 0 for a query that sees no key."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = query.double() @ key.mT * scale
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias.double()
    weights = scores.softmax(-1)
    return weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0) @ value


def error(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return float(difference.nan_to_num(nan=torch.inf))


class Stream:
    """One attention, its buffers and its state."""

    def __init__(
        self,
        images: int = 1,
        heads: int = 2,
        tokens: int = 48,
        width: int = 8,
        *,
        groups: int | None = None,
        value_width: int | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        spread: float = 1.0,
        device: str = "cpu",
    ) -> None:
        groups, value_width = groups or heads, value_width or width
        self.spread, self.scale, self.bias = spread, width**-0.5, bias
        # Views of one tensor with the tokens outside, as the product with joint weights gives them.
        sizes = (heads * width, groups * width, groups * value_width)
        joint = torch.randn(images, tokens, sum(sizes)).to(device, dtype).split(sizes, 2)
        self.query, self.key, self.value = (
            x.unflatten(2, (count, -1)).transpose(1, 2)
            for x, count in zip(joint, (heads, groups, groups), strict=True)
        )
        self.query *= spread
        nans = partial(torch.full, fill_value=torch.nan, device=device)
        self.state = (
            nans((images, tokens, heads, value_width)).transpose(1, 2),
            nans((images, heads, tokens)),
            nans((images, tokens)),
        )

    @property
    def output(self) -> Tensor:
        """The attention in the dtype of the model."""
        return self.state[0].to(self.value.dtype, copy=True)

    @property
    def drift(self) -> Tensor:
        return self.state[2]

    def full(self) -> Tensor:
        inputs = (self.query, self.key, self.value, self.scale, self.bias)
        full_attention(*inputs, *self.state)
        return self.output

    def some(self, count: int) -> Tensor:
        """Positions of tokens, others in each image."""
        images, _, tokens, _ = self.query.shape
        return torch.rand(images, tokens, device=self.query.device).argsort(1)[:, :count]

    def put(self, changed: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """Write new queries, keys and values ``(B, h, U, d)``; returns old keys and values."""
        old = attention_rows.take(self.key, changed), attention_rows.take(self.value, changed)
        for image, places in enumerate(changed):
            for x, new in zip((self.query, self.key, self.value), rows, strict=True):
                x[image, :, places] = new[image].to(x)
        return old

    def update(self, changed: Tensor, *rows: Tensor) -> Tensor:
        """Attention after tokens changed, at random unless it is said to what."""
        if not rows:
            parts = (self.query, self.key, self.value)
            rows = tuple(torch.randn_like(attention_rows.take(x, changed)) for x in parts)
            rows = (rows[0] * self.spread, *rows[1:])
        old = self.put(changed, *rows)
        inputs = (self.query, self.key, self.value, *old, changed, self.scale, self.bias)
        update_attention(*inputs, *self.state)
        return self.output

    def error(self, found: Tensor) -> float:
        return error(found, dense(self.query, self.key, self.value, self.scale, self.bias))
