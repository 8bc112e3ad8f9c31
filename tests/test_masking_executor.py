"""The executor of benchmarks/masking.py computes what the references do that drop tokens by hand.

Breaks if a token that left is still seen as a key or in a mean, a token that stays is hidden, the
cuts come before or behind another block, or the rows of tokens that left change.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


@torch.no_grad()
def test_what_cannot_be_told_apart() -> None:
    """Breaks if an encoder that does not attend as often as it has blocks is compared."""

    class Twice(tiny.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().attend(q, k, super().attend(q, k, v))

    found, kept = masked(tiny.encoder(Twice, depth=4), tiny.images())
    assert kept
    assert found is None
