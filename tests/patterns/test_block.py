"""Blocks: attention and MLP around the stream, in the arrangements that encoders use.

Breaks if an MLP goes to the wrong block, if a block ends too early, or if norms after the branches
hide the additions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.captured import trace
from tests.tiny import WIDTH


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.norm3, self.norm4 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = tiny.Attention(), tiny.Mlp()
        self.other_attention, self.other_mlp = tiny.Attention(), tiny.Mlp()
        self.gamma = nn.Parameter(torch.rand(WIDTH))
        self.drop = nn.Dropout(0.2)


class PostNorm(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        out: Tensor = self.norm2(x + self.mlp(x))
        return out


class ResidualPostNorm(Parts):
    """Swin v2: the branch is normed before it is added."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attention(x))
        out: Tensor = x + self.norm2(self.mlp(x))
        return out


class Sandwich(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm2(self.attention(self.norm1(x)))
        out: Tensor = x + self.norm4(self.mlp(self.norm3(x)))
        return out


class LayerScale(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.gamma * self.attention(self.norm1(x)))
        out: Tensor = x + self.drop(self.gamma * self.mlp(self.norm2(x)))
        return out


class Parallel(Parts):
    """Attention and MLP of one norm, added at once."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        out: Tensor = x + self.attention(normed) + self.mlp(normed)
        return out


class ParallelSum(Parts):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + (self.attention(self.norm1(x)) + self.mlp(self.norm2(x)))
        return out


class ParallelPairs(Parts):
    """Two attentions side by side, then two MLPs side by side."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x)) + self.other_attention(self.norm2(x))
        out: Tensor = x + self.mlp(self.norm3(x)) + self.other_mlp(self.norm4(x))
        return out


class AttentionOnly(Parts):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(self.norm1(x))
        return out


class MlpFirst(Parts):
    """Half an MLP before the attention (Conformer): it belongs to no earlier attention."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.mlp(self.norm1(x))
        x = x + self.attention(self.norm2(x))
        out: Tensor = x + 0.5 * self.other_mlp(self.norm3(x))
        return out


KINDS: dict[str, tuple[type[nn.Module], int, int]] = {
    "pre-norm": (tiny.Block, 1, 1),
    "post-norm": (PostNorm, 1, 1),
    "residual post-norm": (ResidualPostNorm, 1, 1),
    "sandwich": (Sandwich, 1, 1),
    "layer scale": (LayerScale, 1, 1),
    "parallel": (Parallel, 1, 1),
    "parallel, summed first": (ParallelSum, 1, 1),
    "parallel pairs": (ParallelPairs, 2, 2),
    "attention only": (AttentionOnly, 1, 0),
}


@pytest.mark.parametrize("name", KINDS)
def test_arrangement(name: str) -> None:
    kind, attentions, mlps = KINDS[name]
    found = trace(tiny.Encoder([kind(), kind(), kind()]), tiny.images()).found
    assert len(found.blocks) == 3
    for block in found.blocks:
        assert len(block.attentions) == attentions
        assert len(block.mlps) == mlps
    held: list[Any] = [match for block in found.blocks for match in block.attentions]
    assert held == list(found.over_grid)
    assert [match for block in found.blocks for match in block.mlps] == list(found.mlps)
    order = {node: index for index, node in enumerate(found.blocks[0].out.graph.nodes)}
    ends = [order[block.out] for block in found.blocks]
    assert ends == sorted(ends)
    assert not found.misses


def test_an_mlp_before_the_attention_joins_the_block_before() -> None:
    found = trace(tiny.Encoder([MlpFirst(), MlpFirst()]), tiny.images()).found
    assert [len(block.mlps) for block in found.blocks] == [2, 1]


def test_a_block_ends_at_its_last_addition() -> None:
    """Breaks if tokens would be cut in the middle of a block: compared with the module's result."""
    model = tiny.encoder(depth=2)
    traced = trace(model, tiny.images())
    values = traced.values()
    first, second = traced.found.blocks
    assert torch.equal(model.blocks[1](values[first.out]), values[second.out])
    assert torch.equal(model(tiny.images()), values[second.out])


def test_attention_without_a_stream_is_a_miss() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = tiny.Attention()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x)
            return out

    found = trace(tiny.Encoder([Bare()]), tiny.images()).found
    assert len(found.over_grid) == 1
    assert not found.blocks
    (miss,) = found.misses
    assert (miss.pattern, miss.nodes) == ("block", (found.over_grid[0].out,))
    assert "not added to the stream" in miss.reason
