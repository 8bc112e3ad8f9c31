"""Tokens that part and meet again are computed with together, with the same numbers.

Breaks if a table is padded at the wrong end, a token gets the computation of another part, or
tokens that see one another in a part do so among all.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tokenpass
from tests import tiny
from tests.captured import Traced, trace
from tests.zoo import relative_error
from tokenpass.analysis import with_tokens_together

COUNT = (tiny.SIDE // tiny.PATCH) ** 2
EACH = tiny.WIDTH // tiny.HEADS
PREFIX = 2

Turn = Callable[[Tensor, Tensor], Tensor]
"""Queries or keys ``(B, h, N, d)`` and angles ``(patches, d)``, to the same with positions."""


def halves(x: Tensor, angles: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-high, low], -1) * angles.sin()


def pairs(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * angles.cos() + turned * angles.sin()


def behind(turn: Turn) -> Turn:
    def apply(x: Tensor, angles: Tensor) -> Tensor:
        return torch.cat([x[:, :, :PREFIX], turn(x[:, :, PREFIX:], angles)], 2)

    return apply


def one_by_one(x: Tensor, angles: Tensor) -> Tensor:
    parts = [x[:, :, :1], 2.0 * x[:, :, 1:PREFIX], pairs(x[:, :, PREFIX:], angles)]
    return torch.cat(parts, -2)


def of_two(x: Tensor, angles: Tensor) -> Tensor:
    return torch.cat([x.exp()[:, :, :PREFIX], halves(x[:, :, PREFIX:], angles)], 2)


TURNS: dict[str, Turn] = {
    "halves": behind(halves),
    "pairs": behind(pairs),
    "prefix of another value": of_two,
    "one number for all": behind(lambda x, angles: x * angles[:1, :1]),
}

LEFT: dict[str, Turn] = {
    "something happens to a prefix token": one_by_one,
    "tokens see one another": behind(lambda x, angles: x.softmax(2)),
    "another order": behind(lambda x, angles: halves(x, angles).flip(2)),
    "the prefix goes elsewhere": lambda x, angles: torch.cat(
        [halves(x[:, :, PREFIX:], angles), x[:, :, :PREFIX]], 2
    ),
    "another prefix": lambda x, angles: torch.cat(
        [x[:, :, 1 : PREFIX + 1], halves(x[:, :, PREFIX:], angles)], 2
    ),
}


class Turned(tiny.Attention):
    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.turn = turn
        self.register_buffer("angles", torch.rand(COUNT, EACH))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert isinstance(self.angles, Tensor)
        return super().attend(self.turn(q, self.angles), self.turn(k, self.angles), v)


def encoder(turn: Turn) -> nn.Module:
    torch.manual_seed(0)
    blocks = [tiny.Block(lambda: Turned(turn)) for _ in range(2)]
    return tiny.Encoder(blocks, prefix=PREFIX)


@pytest.mark.parametrize("name", TURNS)
@torch.no_grad()
def test_the_same_numbers(name: str) -> None:
    model, images = encoder(TURNS[name]), tiny.images()
    found = trace(model, images)
    together = Traced(with_tokens_together(found.analysis), found.inputs)
    assert together.analysis is not found.analysis
    for traced in (found, together):
        values = traced.values()
        (output,) = traced.graph.find_nodes(op="output")
        assert torch.equal(values[output][0], model(images))
    attentions = together.nodes(torch.ops.aten.scaled_dot_product_attention)
    read = [source for node in attentions for source in node.all_input_nodes[:2]]
    assert {node.target for node in read} == {torch.ops.aten.where.self}


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_what_is_left_as_it_is(name: str) -> None:
    found = trace(encoder(LEFT[name]), tiny.images())
    assert with_tokens_together(found.analysis) is found.analysis


@pytest.mark.parametrize("name", TURNS)
@torch.no_grad()
def test_attention_is_updated_exactly(name: str) -> None:
    """Breaks if rotary positions beside prefix tokens keep attention dense, or turn other rows."""
    model, images = encoder(TURNS[name]), tiny.images()
    method = tokenpass.Eventful(keep=1.0, scene_cut=None)
    backend = tokenpass.backend(method, inner="eager", always_rewrite=True)
    fast = torch.compile(model, backend=backend)
    fast(images)
    for number in range(3):
        frame = images + torch.randn_like(images) * (number + 1) / 10
        assert relative_error(fast(frame), model(frame)) <= 1e-5
    assert not tokenpass.report(fast).refusals
    tokenpass.set_budget(fast, keep=0.5)
    other = torch.randn_like(images)
    for _ in range(3 * 2 * 2):
        settled = fast(other)
    assert relative_error(settled, model(other)) <= 1e-5
