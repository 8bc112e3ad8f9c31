"""The executor of benchmarks/masking.py computes what the references do that drop tokens by hand.

Breaks if a token that left is still seen as a key or in a mean, a token that stays is hidden, the
cuts come before or behind another block, or the rows of tokens that left change.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenpass
from benchmarks.masking import with_fewer_tokens
from tests import tiny
from tests.test_references import PATCHES, default_cuts, expected
from tests.zoo import DIFFERENT, Entry, relative_error, tensors

KEEP = 0.3
TOLERANCE = 1e-5


def masked(model: nn.Module, images: Tensor) -> tuple[Any, list[Tensor]]:
    """What the executor makes of a model, and the tokens that the cuts leave."""
    method = tokenpass.HiPrune(keep=KEEP, dropped="discard")
    options: dict[str, Any] = {"inner": "eager", "always_rewrite": True, "record_cuts": True}
    fast: Any = torch.compile(model, backend=tokenpass.backend(method, **options))
    fast(images)
    (graph,) = tokenpass.report(fast).graphs
    kept = [cut.kept for cut in tokenpass.cuts(fast)]
    return with_fewer_tokens(lambda: model(images), graph, kept), kept


@pytest.mark.parametrize("entry", DIFFERENT)
@torch.no_grad()
def test_equals_the_references(entry: Entry) -> None:
    model, images = entry.build(), entry.images(2)
    found, _ = masked(model, images)
    outputs, _ = expected(entry, model, images, cuts=default_cuts(KEEP), merges=False)
    assert found is not None
    assert relative_error(tensors(found[0]), outputs) <= TOLERANCE
    whole, _ = expected(entry, model, images, cuts={2: PATCHES})
    assert relative_error(whole, outputs) > 10 * TOLERANCE


class TokensFirst(tiny.Block):
    """A block of a stream ``(N, B, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x.transpose(0, 1))).transpose(0, 1)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Turned(tiny.Encoder):
    """The stream as its blocks have it; its mean over tokens comes last."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.table
        if isinstance(self.blocks[0], TokensFirst):
            return self._blocks(x.transpose(0, 1)).mean(0)
        return self._blocks(x).mean(1)

    def _blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def test_a_stream_that_begins_with_tokens() -> None:
    """Breaks if tokens are looked for along another dimension than theirs."""
    torch.manual_seed(0)
    plain, turned = (Turned([b() for _ in range(4)], prefix=0) for b in (tiny.Block, TokensFirst))
    turned.load_state_dict(plain.state_dict())
    (first, kept), (second, again) = (masked(m, tiny.images()) for m in (plain, turned))
    assert [x.tolist() for x in kept] == [x.tolist() for x in again]
    assert first is not None
    assert second is not None
    assert relative_error(second[0], first[0]) <= TOLERANCE
    assert relative_error(first[0], plain(tiny.images())) > 10 * TOLERANCE


SQUARE = tiny.TOKENS
"""As many channels as tokens."""


class MixedHeads(tiny.Attention):
    """Heads are mixed behind the softmax; the bias of that weighs all values."""

    def __init__(self) -> None:
        super().__init__(SQUARE)
        self.mix = nn.Linear(self.heads, self.heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        out: Tensor = self.mix(shares.movedim(1, -1)).movedim(-1, 1) @ v
        return out


class ReadByAQuery(tiny.Encoder):
    """A class token reads the patch tokens and itself; channels first, tokens are averaged."""

    def __init__(self) -> None:
        def block() -> tiny.Block:
            mlp = partial(tiny.Mlp, SQUARE, SQUARE)
            return tiny.Block(MixedHeads, mlp, partial(nn.LayerNorm, SQUARE))

        super().__init__([block() for _ in range(4)], prefix=0, width=SQUARE)
        self.query = nn.Parameter(torch.randn(1, 1, SQUARE))
        self.both = nn.Linear(SQUARE, 2 * SQUARE)

    def forward(self, x: Tensor, left: dict[int, Tensor] | None = None) -> Tensor:
        """``left``: grid positions ``(B, K)`` that stay behind a block."""
        x = self.patch(x).flatten(2).transpose(1, 2) + self.table
        here = torch.arange(SQUARE).expand(x.shape[0], -1)
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if left is not None and number in left:
                stays = (here[:, :, None] == left[number][:, None]).any(2)
                x, here = x[stays].unflatten(0, (x.shape[0], -1)), left[number]
        query = self.query.expand(x.shape[0], -1, -1)
        k, v = self.both(torch.cat([query, x], 1)).chunk(2, -1)
        read = functional.scaled_dot_product_attention(query, k, v)
        return (query + read).squeeze(1) + x.transpose(1, 2).mean(2)


@torch.no_grad()
def test_heads_mixed_a_class_token_and_as_many_channels() -> None:
    """Breaks if a value has a weight whose key is hidden, if a token that joins the patch tokens
    hides none of them, or if channels are taken for tokens."""
    torch.manual_seed(0)
    model, images = ReadByAQuery(), tiny.images()
    found, kept = masked(model, images)
    left = dict(zip(default_cuts(KEEP), kept, strict=True))
    assert found is not None
    assert relative_error(found[0], model(images, left)) <= TOLERANCE
    assert relative_error(found[0], model(images)) > 10 * TOLERANCE


@torch.no_grad()
def test_what_cannot_be_told_apart() -> None:
    """Breaks if an encoder that does not attend as often as it has blocks is compared."""

    class Twice(tiny.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().attend(q, k, super().attend(q, k, v))

    found, kept = masked(tiny.encoder(Twice, depth=4), tiny.images())
    assert kept
    assert found is None
