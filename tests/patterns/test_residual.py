"""Additions to the residual stream: which part is the stream, and what the branch starts from.

Breaks if a position table or a rotary embedding passes for a residual, or if skip and branch are
exchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.captured import Traced, trace
from tests.tiny import WIDTH
from tokenpass.graph import place

Add = Callable[[Tensor, Tensor, Tensor], Tensor]


class Adding(nn.Module):
    """One attention, added in some way."""

    def __init__(self, add: Add) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), tiny.Attention()
        self.gamma = nn.Parameter(torch.rand(WIDTH))
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.attention(self.norm(x)), self.gamma)


ADDITIONS: dict[str, Add] = {
    "skip first": lambda x, branch, gamma: x + branch,
    "branch first": lambda x, branch, gamma: branch + x,
    "method": lambda x, branch, gamma: branch.add(x),
    "in place": lambda x, branch, gamma: branch.add_(x),
    "layer scale": lambda x, branch, gamma: x + gamma * branch,
    "addcmul": lambda x, branch, gamma: torch.addcmul(x, branch, gamma),
    "drop path": lambda x, branch, gamma: x + nn.Dropout(0.3).eval()(branch),
    "scaled skip": lambda x, branch, gamma: gamma * x + branch,
    "weighted": lambda x, branch, gamma: x + branch * 0.5,
    "between": lambda x, branch, gamma: x.lerp(branch, 0.3),
    "between, by channel": lambda x, branch, gamma: torch.lerp(x, branch, gamma),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_spelling(name: str) -> None:
    traced = trace(tiny.Encoder([Adding(ADDITIONS[name])]), tiny.images())
    (residual,) = traced.found.residuals
    (attention,) = traced.found.over_grid
    (norm,) = traced.found.norms
    assert residual.root is norm.input
    assert depends_on(residual.branch, attention.out)
    assert not depends_on(residual.skip, attention.out)
    assert len(traced.found.blocks) == 1


def depends_on(node: object, source: object) -> bool:
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        fresh = [n for n in current.all_input_nodes if n not in seen]  # type: ignore[attr-defined]
        seen.update(fresh)
        stack += fresh
    return source in seen


def sums(traced: Traced) -> int:
    return len(traced.nodes(torch.ops.aten.add))


def test_tables_are_no_residuals() -> None:
    """The position table is added to the tokens, and so is a bias: neither is a branch."""
    traced = trace(tiny.encoder(depth=1), tiny.images())
    assert sums(traced) == 3
    assert len(traced.found.residuals) == 2
    assert all("tiny.py" in place(item.out) for item in traced.found.residuals)


def test_sums_of_independent_parts_are_no_residuals() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.left(x) + self.right(x)
            return out

    model = tiny.Encoder([tiny.Block(mlp=Two)])
    traced = trace(model, tiny.images())
    assert sums(traced) == 4
    assert len(traced.found.residuals) == 2


def test_rotary_sums_are_no_residuals() -> None:
    class Rotary(tiny.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().attend(self.turn(q), self.turn(k), v)

        def turn(self, x: Tensor) -> Tensor:
            angle = torch.arange(x.shape[2]).outer(torch.arange(1.0, 5.0))
            first, second = x.chunk(2, -1)
            return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    traced = trace(tiny.encoder(Rotary, depth=1), tiny.images())
    assert len(traced.found.residuals) == 2
    assert len(traced.found.blocks) == 1


def test_one_stream_of_two() -> None:
    """Breaks if a skip that is a piece of what the branch starts from is not recognised."""

    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(WIDTH), tiny.Attention()
            self.mix = nn.Parameter(torch.randn(2, 1))

        def forward(self, x: Tensor) -> Tensor:
            both = self.mix @ x.unsqueeze(-2)  # (B, N, 2, C)
            out: Tensor = both[..., 0, :] + self.attention(self.norm(both[..., 1, :]))
            return out

    traced = trace(tiny.Encoder([Streams()]), tiny.images())
    (residual,) = traced.found.residuals
    (attention,) = traced.found.over_grid
    assert depends_on(residual.branch, attention.out)
    assert len(traced.found.blocks) == 1
