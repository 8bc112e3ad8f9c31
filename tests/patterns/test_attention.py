"""Attention is found however it is spelled, and its parts say what the model computes.

The parts are held against the numbers of the traced graph: ``softmax(q k^T * scale + masks) v`` is
computed from the nodes that the match names and compared with the node that it calls the result.
Breaks if the walk from the softmax loses a scale or a mask, or takes keys for queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests import tiny
from tests.captured import Traced, trace
from tests.tiny import HEADS, TOKENS, WIDTH
from tokenpass.blocks import Attention

SCALE = (WIDTH // HEADS) ** -0.5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def additive() -> Tensor:
    count = TOKENS + 1
    return torch.linspace(-1, 1, count * count).reshape(count, count)


def relative_to(q: Tensor) -> Tensor:
    """A bias ``(B, h, N, N)`` that looks like scores but is no product of queries and keys."""
    return q.sum(-1, keepdim=True) * q.sum(-1).unsqueeze(-2)


def allowed() -> Tensor:
    return (additive() < 0.5) | torch.eye(TOKENS + 1, dtype=torch.bool)


def grown(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads folded into the batch."""
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def with_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = grown(q, k, v)
    out: Tensor = torch.bmm(torch.bmm(a * SCALE, b.mT).softmax(-1), c).unflatten(0, q.shape[:2])
    return out


def with_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = grown(q, k, v)
    empty = torch.empty(a.shape[0], a.shape[1], b.shape[1])
    scores = torch.baddbmm(empty, a, b.mT, beta=0, alpha=SCALE)
    out: Tensor = torch.bmm(scores.softmax(-1), c).unflatten(0, q.shape[:2])
    return out


def with_added_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = grown(q, k, v)
    scores = torch.baddbmm(additive().expand(a.shape[0], -1, -1), a, b.mT, alpha=SCALE)
    out: Tensor = torch.bmm(scores.softmax(-1), c).unflatten(0, q.shape[:2])
    return out


def with_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE
    out: Tensor = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
    return out


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", a, b) * SCALE
    out: Tensor = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), c).transpose(1, 2)
    return out


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores transposed: the softmax runs along the first of the two token dimensions."""
    out: Tensor = (k @ q.mT * SCALE).softmax(-2).mT @ v
    return out


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).to(torch.float32) * SCALE
    out: Tensor = functional.dropout(scores.softmax(-1).to(v.dtype), 0.5, training=False) @ v
    return out


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = (q @ k.mT * SCALE).softmax(-1) @ v
    return out


sdpa = functional.scaled_dot_product_attention

PLAIN: dict[str, tuple[Attend, float, int]] = {
    "fused": (sdpa, SCALE, 0),
    "fused with a scale": (lambda q, k, v: sdpa(q, k, v, scale=0.3), 0.3, 0),
    "fused with a scaled query": (lambda q, k, v: sdpa(q * 0.3, k, v, scale=1.0), 1.0, 0),
    "fused with an additive mask": (lambda q, k, v: sdpa(q, k, v, additive()), SCALE, 1),
    "fused with a boolean mask": (lambda q, k, v: sdpa(q, k, v, allowed()), SCALE, 1),
    "scale on the scores": (by_hand, SCALE, 0),
    "scale as a divisor": (
        lambda q, k, v: (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v,
        SCALE,
        0,
    ),
    "scale on the queries": (lambda q, k, v: ((q * SCALE) @ k.mT).softmax(-1) @ v, 1.0, 0),
    "scale on the keys": (lambda q, k, v: (q @ (k * SCALE).mT).softmax(-1) @ v, 1.0, 0),
    "scale in two places": (
        lambda q, k, v: ((q * 0.5) @ k.mT * 0.5 / 2.0).softmax(-1) @ v,
        0.25,
        0,
    ),
    "no scale": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, 1.0, 0),
    "transposed keys first": (
        lambda q, k, v: (q @ k.transpose(-2, -1).contiguous() * SCALE).softmax(3) @ v,
        SCALE,
        0,
    ),
    "bmm": (with_bmm, 1.0, 0),
    "baddbmm": (with_baddbmm, SCALE, 0),
    "baddbmm with a bias": (with_added_bias, SCALE, 1),
    "einsum": (with_einsum, SCALE, 0),
    "einsum with tokens first": (tokens_first, SCALE, 0),
    "scores transposed": (keys_first, SCALE, 0),
    "additive mask": (
        lambda q, k, v: (q @ k.mT * SCALE + additive()).softmax(-1) @ v,
        SCALE,
        1,
    ),
    "bias computed from the queries": (
        lambda q, k, v: (relative_to(q) + q @ k.mT).softmax(-1) @ v,
        1.0,
        1,
    ),
    "two masks": (
        lambda q, k, v: (additive() + q @ k.mT * SCALE + additive()[0]).softmax(-1) @ v,
        SCALE,
        2,
    ),
    "float32 softmax": (in_float32, SCALE, 0),
    "float32 in the softmax": (
        lambda q, k, v: (q @ k.mT * SCALE).softmax(-1, dtype=torch.float32).to(v.dtype) @ v,
        SCALE,
        0,
    ),
    "normed queries and keys": (
        lambda q, k, v: sdpa(
            functional.layer_norm(q, q.shape[-1:]), functional.layer_norm(k, k.shape[-1:]), v
        ),
        SCALE,
        0,
    ),
    "multi-query": (lambda q, k, v: by_hand(q, k[:, :1], v[:, :1]), SCALE, 0),
    "multi-query, expanded": (
        lambda q, k, v: sdpa(q, k[:, :1].expand_as(q), v[:, :1].expand_as(q)),
        SCALE,
        0,
    ),
    "grouped": (
        lambda q, k, v: sdpa(
            q, k[:, :1].repeat_interleave(HEADS, 1), v[:, :1].repeat_interleave(HEADS, 1)
        ),
        SCALE,
        0,
    ),
    "grouped in the operator": (
        lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True),
        SCALE,
        0,
    ),
}

NOT_PLAIN: dict[str, Attend] = {
    "boolean fill": lambda q, k, v: (
        (q @ k.mT * SCALE).masked_fill(~allowed(), -torch.inf).softmax(-1) @ v
    ),
    "where": lambda q, k, v: torch.where(allowed(), q @ k.mT, -1e4).softmax(-1) @ v,
    "mask before the scale": lambda q, k, v: ((q @ k.mT + additive()) * SCALE).softmax(-1) @ v,
    "scale of each head": lambda q, k, v: (
        (q @ k.mT * torch.arange(1.0, 3.0)[:, None, None]).softmax(-1) @ v
    ),
    "talking heads": lambda q, k, v: (
        functional.linear(
            functional.linear((q @ k.mT).permute(0, 2, 3, 1), torch.eye(HEADS) + 0.5)
            .permute(0, 3, 1, 2)
            .softmax(-1)
            .permute(0, 2, 3, 1),
            torch.eye(HEADS) + 0.5,
        ).permute(0, 3, 1, 2)
        @ v
    ),
    "talking heads by convolution": lambda q, k, v: (
        functional.conv2d((q @ k.mT), (torch.eye(HEADS) + 0.5)[..., None, None]).softmax(-1) @ v
    ),
    "probabilities changed": lambda q, k, v: (q @ k.mT).softmax(-1).square() @ v,
}


def spelled(attend: Attend) -> tiny.Part:
    class Spelled(tiny.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    return Spelled


def recomputed(found: Traced, match: Attention) -> tuple[Tensor, Tensor]:
    """The result of an attention from its parts, and from the graph."""
    values = found.values()
    query = values[match.query].movedim(match.channel[0], -1)
    key = values[match.key].movedim(match.channel[1], -1)
    scores = query @ key.mT * match.scale
    for mask in match.masks:
        value = values[mask.node]
        scores = (
            scores.masked_fill(~value, -torch.inf)
            if value.dtype == torch.bool
            else (scores + value)
        )
    return scores.softmax(-1) @ values[match.value], values[match.out]


CASES = [(name, torch.float32) for name in PLAIN]
CASES += [(name, torch.bfloat16) for name in PLAIN if "float32" in name]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_spelling(name: str, dtype: torch.dtype) -> None:
    attend, scale, masks = PLAIN[name]
    found = trace(tiny.encoder(spelled(attend), depth=1).to(dtype), tiny.images(dtype=dtype))
    assert len(found.found.over_grid) == len(found.found.attentions) == 1
    for match in found.found.over_grid:
        assert match.plain
        assert match.fused == name.startswith(("fused", "normed", "grouped", "multi-query,"))
        assert match.scale == pytest.approx(scale, rel=1e-6)
        assert len(match.masks) == masks
        assert match.query_dim == match.key_dim
        mine, theirs = recomputed(found, match)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert torch.allclose(mine.float(), theirs.float(), rtol=0, atol=tolerance)
    assert len(found.found.blocks) == 1


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_spelling_that_is_not_plain(name: str) -> None:
    """Breaks if scores are recomputed without something that changes them."""
    found = trace(tiny.encoder(spelled(NOT_PLAIN[name]), depth=1), tiny.images())
    assert len(found.found.over_grid) == 1
    assert not any(match.plain for match in found.found.over_grid)
    assert len(found.found.blocks) == 1


def keys_of(found: Traced, match: Attention) -> Tensor:
    value: Tensor = found.values()[match.key]
    return value


def test_keys_and_queries_are_not_exchanged() -> None:
    """Breaks where the walk takes the wrong operand of a symmetric product."""
    for attend in (by_hand, with_einsum, keys_first):
        model = tiny.encoder(spelled(attend), depth=1)
        found = trace(model, tiny.images())
        (match,) = found.found.attentions
        block = model.blocks[0]
        assert isinstance(block, tiny.Block)
        values = found.values()
        stream = values[found.found.residuals[0].skip]
        q, k, _ = block.attention.project(block.norm1(stream))  # type: ignore[operator]
        mine = keys_of(found, match).movedim(match.channel[1], -1).reshape(k.shape)
        assert torch.allclose(mine, k, atol=1e-6)
        assert not torch.allclose(mine, q, atol=1e-2)
