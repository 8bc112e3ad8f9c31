"""Tokens leave the token-wise parts of encoders whose attention needs all of them.

The reference runs the same modules by hand: at the cut it merges tokens, and behind it it computes
MLPs for those that are left only. It is told which tokens were kept, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tests.tiny as tiny
import tokenpass
from tests.zoo import relative_error

SIDE = 16
"""Of the image; the grid has eight rows."""

GRID = SIDE // tiny.PATCH
WINDOW = 4
WIDTH = 32

TOLERANCE = 1e-5
"""Relative, in float32: rows are computed in matrices of other sizes."""


class Windowed(nn.Module):
    """Attention inside of windows of a ``(B, H, W, C)`` stream."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.inner = tiny.Attention(WIDTH)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        images, height, width, channels = x.shape
        rolled = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        split = rolled.reshape(
            images, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels
        ).transpose(2, 3)
        out = self.inner(split.reshape(-1, WINDOW * WINDOW, channels)).reshape(split.shape)
        merged = out.transpose(2, 3).reshape(images, height, width, channels)
        return torch.roll(merged, (self.shift, self.shift), (1, 2)) if self.shift else merged


class Pooled(nn.Module):
    """Attention of all tokens to pooled keys, in a ``(B, H, W, C)`` stream."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.Attention(WIDTH)
        self.reduce = nn.Conv2d(WIDTH, WIDTH, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        images, height, width, channels = x.shape
        pooled = self.reduce(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        q, _, _ = self.inner.project(x.reshape(images, -1, channels))
        _, k, v = self.inner.project(pooled)
        out = self.inner.attend(q, k, v).transpose(1, 2)
        projected: Tensor = self.inner.proj(out.reshape(images, height, width, channels))
        return projected


class Encoder(nn.Module):
    """Patch embedding, blocks on a grid, a head."""

    def __init__(self, attention: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, tiny.PATCH, tiny.PATCH)
        self.blocks = nn.ModuleList(
            tiny.Block(attention, lambda: tiny.Mlp(WIDTH, 4 * WIDTH), lambda: nn.LayerNorm(WIDTH))
            for _ in range(depth)
        )
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x


KINDS: dict[str, Callable[[], nn.Module]] = {
    "windows": Windowed,
    "shifted windows": lambda: Windowed(2),
    "pooled keys": Pooled,
}


def compiled(model: nn.Module, **options: Any) -> Any:
    backend = tokenpass.backend(tokenpass.HiPrune(**options), inner="eager", always_rewrite=True)
    return torch.compile(model, backend=backend)


def merged(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The stream ``(B, N, C)`` with each token's value that of its cluster, and the clusters."""
    result, owners = x.clone(), torch.zeros(x.shape[:2], dtype=torch.int64)
    for image in range(len(x)):
        tokens, own = x[image], kept[image]
        likeness = functional.normalize(tokens, dim=1) @ functional.normalize(tokens[own], dim=1).T
        likeness[own] = torch.eye(len(own)) * 4.0  # a kept token stays with itself
        owner = likeness.argmax(1)
        for cluster in range(len(own)):
            result[image, owner == cluster] = tokens[owner == cluster].mean(0)
        owners[image] = own[owner]
    return result, owners


def reference(model: Encoder, x: Tensor, kept: Tensor) -> Tensor:
    """Two blocks: one cut in the first, one more without effect in the second."""
    stream = model.patch(x).permute(0, 2, 3, 1)
    first, second = model.blocks
    assert isinstance(first, tiny.Block)
    assert isinstance(second, tiny.Block)
    stream = stream + first.attention(first.norm1(stream))
    flat, owner = merged(stream.flatten(1, 2), kept)

    def of_owners(value: Tensor) -> Tensor:
        return value.gather(1, owner[..., None].expand_as(value))

    flat = flat + of_owners(first.mlp(first.norm2(flat)))
    grid = flat.reshape(stream.shape)
    attended = second.attention(second.norm1(grid)).flatten(1, 2)
    flat = flat + (of_owners(attended) if projection_is_cut(second) else attended)
    flat = flat + of_owners(second.mlp(second.norm2(flat)))
    return flat.reshape(stream.shape)


def projection_is_cut(block: tiny.Block) -> bool:
    """The projection behind a shifted attention works on other positions than the stream's."""
    attention = block.attention
    return not (isinstance(attention, Windowed) and attention.shift)


@pytest.mark.parametrize("kind", KINDS)
def test_full_budget(kind: str) -> None:
    """Breaks if rows come back in another order than they were taken."""
    model, images = Encoder(KINDS[kind]), tiny.images(side=SIDE)
    with torch.no_grad():
        expected = model(images)
        fast = compiled(model, keep=1.0)
        assert relative_error(fast(images), expected) <= TOLERANCE
    assert tokenpass.report(fast).converted


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_tokens(kind: str) -> None:
    """Breaks if a dropped token does not get what its cluster computes."""
    model, images = Encoder(KINDS[kind]), tiny.images(side=SIDE)
    with torch.no_grad():
        fast = compiled(model, stages=((1, 0.5),))
        found = fast(images)
        kept = tokenpass.kept(fast)
        assert kept.shape == (2, GRID * GRID // 2)
        assert relative_error(found, reference(model, images, kept)) <= TOLERANCE


def test_fewer_operations() -> None:
    """Breaks if the report promises more than the token-wise parts can save."""
    model, images = Encoder(Windowed), tiny.images(side=SIDE)
    report = tokenpass.explain(model, images, method=tokenpass.HiPrune(stages=((1, 0.5),)))
    assert report.converted
    assert [row.tokens_in for row in report.graphs[0].blocks] == [64, 32]
    assert [row.tokens_out for row in report.graphs[0].blocks] == [32, 32]
    mlp, projection = 2 * 2 * WIDTH * 4 * WIDTH, 2 * WIDTH * WIDTH
    joint = 3 * projection
    rows, images_count = GRID * GRID // 2, 2
    saved = images_count * rows * (2 * mlp + projection + joint)
    search = images_count * 2 * rows * rows * WIDTH
    assert report.flops_before - report.flops == saved - search


def test_discarded_tokens_keep_their_value() -> None:
    """Breaks if something is added to a token that was discarded, other than attention."""
    model, images = Encoder(Windowed, depth=1), tiny.images(side=SIDE)
    (block,) = model.blocks
    assert isinstance(block, tiny.Block)
    with torch.no_grad():
        fast = compiled(model, keep=0.5, dropped="discard")
        found = fast(images).flatten(1, 2)
        kept = tokenpass.kept(fast)
        stream = model.patch(images).permute(0, 2, 3, 1)
        stream = stream + block.attention(block.norm1(stream))
        expected = stream.flatten(1, 2).clone()
        full = (stream + block.mlp(block.norm2(stream))).flatten(1, 2)
        index = kept[..., None].expand(-1, -1, WIDTH)
        expected.scatter_(1, index, full.gather(1, index))
    assert relative_error(found, expected) <= TOLERANCE


def test_gradients_at_full_budget() -> None:
    """Breaks if a row is taken in a way that gradients do not flow through."""
    model, images = Encoder(Windowed), tiny.images(side=SIDE)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(images).square().sum(), parameters)
    fast = compiled(model, keep=1.0)
    found = torch.autograd.grad(fast(images).square().sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output": "pruned"}, "output="),
        ({"where": "output"}, "where="),
        ({"ranking": "class"}, "class token"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    """Breaks if a request that needs global attention is answered with something else."""
    model, images = Encoder(Windowed), tiny.images(side=SIDE)
    report = tokenpass.explain(model, images, method=tokenpass.HiPrune(keep=0.5, **options))
    assert not report.converted
    assert any(words in item.reason for item in report.refusals), report.refusals


@pytest.mark.slow
def test_the_batch_may_change() -> None:
    """Breaks if the rows of one batch size are used for another."""
    model = Encoder(Windowed)
    fast = compiled(model, keep=1.0)
    with torch.no_grad():
        for batch in (2, 3, 5):
            images = tiny.images(batch, side=SIDE)
            assert relative_error(fast(images), model(images)) <= TOLERANCE
