"""What is no attention among patch tokens is reported: the reason, and the nodes at fault.

Breaks if a pattern takes what it must not (tokens would leave where their order or their neighbours
matter), or if it says nothing.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests import tiny
from tests.captured import trace
from tests.tiny import TOKENS, WIDTH
from tokenpass.blocks import NoMatch


class Causal(tiny.Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class OverQueries(tiny.Attention):
    """The softmax runs along the queries, the product sums over the keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-2) @ v


class OverHeads(tiny.Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(1) @ v


class NoValues(tiny.Attention):
    """Softmax of the scores, read by nothing that sums over the keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v * (q @ k.mT).softmax(-1).amax(-1, keepdim=True)


class Channels(tiny.Attention):
    """Cross-covariance attention: channels attend to channels."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q.mT @ k).softmax(-1) @ v.mT).mT


class Projected(tiny.Attention):
    """Scores are a linear function of the tokens, no product of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(WIDTH // 2, TOKENS + 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.scores(q).softmax(-1) @ v
        return out


class Linear(tiny.Attention):
    """Attention without a softmax of scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class Windows(tiny.Attention):
    """Tokens of a 2 x 2 window attend to one another."""

    def forward(self, x: Tensor) -> Tensor:
        side = tiny.SIDE // tiny.PATCH
        cut = x.unflatten(1, (side // 2, 2, side // 2, 2)).transpose(2, 3)
        inner = super().forward(cut.reshape(-1, 4, WIDTH))
        back = inner.reshape(-1, side // 2, side // 2, 2, 2, WIDTH).transpose(2, 3)
        return back.reshape(x.shape)


class Pooled(tiny.Attention):
    """Keys and values of half the resolution."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (
            functional.avg_pool1d(y.flatten(0, 1).mT, 2).mT.unflatten(0, y.shape[:2])
            for y in (k, v)
        )
        return functional.scaled_dot_product_attention(q, k, v)


class Latent(nn.Module):
    """A learned query looks at the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.scaled_dot_product_attention(
            self.query.expand(x.shape[0], -1, -1), x, x
        )


MISSES: dict[str, tuple[tiny.Part, int, str, str]] = {
    "causal": (Causal, 1, "causal attention", "scaled_dot_product_attention"),
    "over queries": (OverQueries, 1, "", "softmax"),
    "over heads": (OverHeads, 1, "not summed over in a product with values", "softmax"),
    "no values": (NoValues, 1, "not summed over in a product with values", "softmax"),
    "over channels": (Channels, 1, "", "softmax"),
    "projected": (Projected, 1, "", "softmax"),
    "linear": (Linear, 1, "", "softmax"),
    "windows": (Windows, 0, "windowed attention", "scaled_dot_product_attention"),
    "pooled keys": (Pooled, 0, "queries and keys are different tokens", ""),
    "latent query": (Latent, 1, "attention pooling", "scaled_dot_product_attention"),
}


def misses_of(part: tiny.Part, prefix: int) -> list[NoMatch]:
    model = tiny.Encoder([tiny.Block(part)], prefix)
    found = trace(model, tiny.images()).found
    assert not found.over_grid
    assert not found.blocks
    assert found.misses
    return list(found.misses)


@pytest.mark.parametrize("name", MISSES)
def test_near_miss(name: str) -> None:
    part, prefix, reason, node = MISSES[name]
    misses = misses_of(part, prefix)
    assert any(reason in miss.reason for miss in misses), list(map(str, misses))
    assert all(miss.nodes for miss in misses)
    assert any(first.name.startswith(node) for miss in misses for first in miss.nodes)


def test_a_pooling_head_is_reported_and_the_blocks_are_found() -> None:
    model = tiny.Encoder([tiny.Block(), tiny.Block(), Latent()])
    found = trace(model, tiny.images()).found
    assert len(found.attentions) == 3
    assert len(found.over_grid) == len(found.blocks) == 2
    (miss,) = found.misses
    assert "attention pooling" in miss.reason
    assert miss.nodes[0] is found.attentions[2].softmax


def test_a_miss_tells_where() -> None:
    (miss,) = misses_of(Causal, 1)
    assert str(miss).startswith("attention: causal attention")
    assert "scaled_dot_product_attention" in str(miss)
    assert "test_attention_misses.py" in miss.nodes[0].meta["stack_trace"]


def test_tokens_from_outside_the_graph_are_no_grid() -> None:
    """Breaks if a sequence of unknown make-up is taken for patch tokens."""
    found = trace(tiny.Block().eval(), torch.randn(2, TOKENS, WIDTH)).found
    assert found.grid is None
    assert any("arrives from outside the graph" in miss.reason for miss in found.misses)
