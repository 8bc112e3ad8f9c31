"""The patch embedding: which node makes the positions, and where they become tokens.

Breaks if a stem's first layer is taken for the patch grid, or if patches that are cut out by a
reshape are not understood.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests import tiny
from tests.captured import trace
from tests.soundness import length
from tests.tiny import PATCH, SIDE, WIDTH

ROWS = SIDE // PATCH

Embed = Callable[[nn.Module, Tensor], Tensor]


class Embedded(tiny.Encoder):
    """An encoder with another patch embedding."""

    def __init__(self, embed: Callable[[Embedded, Tensor], Tensor]) -> None:
        super().__init__([tiny.Block()], prefix=0)
        self.linear = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.embed = embed

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks[0](self.embed(self, x) + self.table)
        return out


def by_reshape(m: Embedded, x: Tensor) -> Tensor:
    cut = x.reshape(x.shape[0], 3, ROWS, PATCH, ROWS, PATCH).permute(0, 2, 4, 1, 3, 5)
    out: Tensor = m.linear(cut.reshape(x.shape[0], ROWS * ROWS, -1))
    return out


def by_tensor_unfold(m: Embedded, x: Tensor) -> Tensor:
    cut = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    out: Tensor = m.linear(cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
    return out


EMBEDDINGS: dict[str, tuple[Callable[[Embedded, Tensor], Tensor], list[str]]] = {
    "convolution": (lambda m, x: m.patch(x).flatten(2).transpose(1, 2), ["conv2d"]),
    "channels last": (
        lambda m, x: m.norm(m.patch(x).permute(0, 2, 3, 1)).flatten(1, 2),
        ["conv2d"],
    ),
    "stem": (lambda m, x: m.patch(m.stem(x).relu()).flatten(2).mT, ["conv2d_1"]),
    "reshape": (by_reshape, ["arg"]),
    "tensor unfold": (by_tensor_unfold, ["unfold", "unfold_1"]),
    "unfold": (
        lambda m, x: m.linear(functional.unfold(x, PATCH, stride=PATCH).mT),
        ["im2col"],
    ),
    "unshuffle": (
        lambda m, x: m.linear(functional.pixel_unshuffle(x, PATCH).flatten(2).mT),
        ["arg"],
    ),
    "pooled": (
        lambda m, x: (
            functional.avg_pool2d(
                functional.conv2d(x, m.patch.weight, m.patch.bias, padding=1, dilation=2), 2
            )
            .flatten(2)
            .mT
        ),
        ["avg_pool2d"],
    ),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_spelling(name: str) -> None:
    embed, makers = EMBEDDINGS[name]
    traced = trace(Embedded(embed), tiny.images())
    found = traced.found
    assert found.grid is not None
    assert [int(size) for size in found.grid.shape] == [ROWS, ROWS]
    assert found.embedding is not None
    names = [node.name for node in found.embedding.makers]
    assert all(name.startswith(maker) for name, maker in zip(names, makers, strict=True)), names
    dims = traced.facts.dims(found.embedding.out)
    (place,) = found.grid.carried_in(dims)
    assert length(dims[place]) == ROWS * ROWS
    assert len(found.blocks) == 1


def test_tokens_begin_at_the_flatten() -> None:
    """Breaks if the embedding is said to end later, at the position table."""
    traced = trace(tiny.encoder(depth=1), tiny.images())
    assert traced.found.embedding is not None
    (convolution,) = traced.nodes(torch.ops.aten.conv2d)
    assert traced.found.embedding.makers == (convolution,)
    assert list(convolution.users) == [traced.found.embedding.out]
