"""Models that Dynamo makes several graphs of: what one graph knows of another one's tokens.

Breaks if tokens are followed to where they are not, if a graph runs on tensors that it was not made
for, or if the class token of another graph is taken for a patch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenpass
from tests.pieces import QUIET, fresh, gated, pruned  # noqa: F401
from tests.tiny import TOKENS, WIDTH, Attention, Block, Encoder, encoder, images
from tokenpass import HiPrune

PREFIX = 3

pytestmark = [QUIET, pytest.mark.usefixtures("fresh")]


class Broken(Encoder):
    """Two blocks behind the patch embedding, and two more; graph breaks before, between or both."""

    breaks: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1) + self.table
        if 0 in self.breaks:
            torch._dynamo.graph_break()
        x = self.blocks[1](self.blocks[0](x))
        if 2 in self.breaks:
            torch._dynamo.graph_break()
        out: Tensor = self.blocks[3](self.blocks[2](x))
        return out


def broken(*breaks: int) -> Broken:
    model = Broken([Block() for _ in range(4)], prefix=PREFIX)
    model.breaks = breaks
    return model


def test_blocks_behind_a_break_are_pruned_as_without_one() -> None:
    """Breaks if the graph behind a break does not know the grid, or where class tokens lie."""
    model = broken(0)
    x = images()
    fast = pruned(model)
    found, kept = fast(x), tokenpass.kept(fast)
    first, second = tokenpass.report(fast).graphs
    assert (first.grid, second.grid) == ((), (4, 4))
    model.breaks = ()
    torch._dynamo.reset()
    whole = pruned(model)
    assert torch.equal(found, whole(x))
    assert torch.equal(kept, tokenpass.kept(whole))


@pytest.mark.parametrize("breaks", [(0,), (2,), (0, 2)])
def test_full_budget_is_the_model(breaks: tuple[int, ...]) -> None:
    model = broken(*breaks)
    fast = pruned(model, keep=1.0)
    for batch in (2, 3):
        x = images(batch)
        assert torch.equal(fast(x), model(x))
    assert all(graph.blocks for graph in tokenpass.report(fast).graphs if graph.attentions)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
def test_gradients_go_through_breaks() -> None:
    """Breaks if what a graph returns is not what its gradients flow through."""
    model = broken(0, 2)
    x = images()
    with torch.enable_grad():
        (wanted,) = torch.autograd.grad(model(x).square().sum(), model.patch.weight)
        (found,) = torch.autograd.grad(pruned(model, 1.0)(x).square().sum(), model.patch.weight)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_every_graph_gets_the_budget_and_spares_the_prefix() -> None:
    """Breaks if prefix tokens that come from another graph are counted or dropped.

    Behind a merging cut most patch tokens are copies of others; prefix tokens never are.
    """
    model = broken(0, 2)
    fast = pruned(model, keep=0.25)
    out = fast(images())
    assert tokenpass.kept(fast).shape == (2, TOKENS // 4)
    assert all(cut.kept.max() < TOKENS for cut in tokenpass.cuts(fast))
    for row in out:
        assert len(row[PREFIX:].unique(dim=0)) <= TOKENS // 4
        assert len(row.unique(dim=0)) == PREFIX + len(row[PREFIX:].unique(dim=0))
    tokenpass.set_budget(fast, keep=1.0)
    assert torch.equal(fast(images()), model(images()))


def test_a_graph_of_one_block_merges_nothing() -> None:
    """Breaks if tokens become one in the first block of a model whose blocks are graphs.

    Full attention and the first addition are the model's; the MLP's branch is the owner's.
    """
    model, embed, _ = pieces(depth=1)
    (block,) = model.blocks
    fast = pruned(block)
    tokens = embed(images())
    found = fast(tokens)
    (cut,) = tokenpass.cuts(fast)
    assert cut.owner is not None
    stream = tokens + block.attention(block.norm1(tokens))  # type: ignore[operator]
    branch = block.mlp(block.norm2(stream))  # type: ignore[operator]
    owner = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + cut.owner], 1)
    wanted = stream + branch.gather(1, owner[..., None].expand_as(branch))
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert cut.kept.shape == (2, TOKENS // 2)
    tokenpass.set_budget(fast, keep=1.0)
    assert torch.allclose(fast(embed(images())), model(images()), rtol=1e-6, atol=1e-6)


def test_explain_says_what_happens() -> None:
    """Breaks if only compiled graphs tell one another of tokens."""
    model = broken(0)
    planned = tokenpass.explain(model, images(), method=HiPrune(keep=0.5))
    fast = pruned(model)
    fast(images())
    assert planned.converted
    assert planned.flops == tokenpass.report(fast).flops


# ---------------------------------------------------------------- tensors of elsewhere


def pieces(depth: int = 2) -> tuple[Encoder, Any, Any]:
    """A model, and its embedding and its blocks compiled one by one."""
    model = encoder(depth=depth)

    def embed(x: Tensor) -> Tensor:
        x = model.patch(x).flatten(2).transpose(1, 2)
        return torch.cat([model.prefix.expand(x.shape[0], -1, -1), x], 1) + model.table

    def blocks(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x)
        return x

    return model, pruned(embed), pruned(blocks)


def test_a_graph_runs_as_it_is_on_what_it_was_not_made_for() -> None:
    """Breaks if tokens of another origin, or in another order, are pruned as those of a grid."""
    model, embed, blocks = pieces()
    x = images()
    wanted = model(x)
    assert not torch.equal(blocks(embed(x)), wanted)
    assert tokenpass.kept(blocks).shape == (2, TOKENS // 2)
    assert torch.equal(blocks(embed(x).clone()), wanted)
    assert not tokenpass.report(blocks).converted
    assert "arrives from outside" in tokenpass.report(blocks).refusals[0].reason
    tokens = embed(x)
    tokens.copy_(tokens.flip(1))
    expected = model.blocks[1](model.blocks[0](tokens))
    assert torch.equal(blocks(tokens), expected)
    assert not torch.equal(blocks(embed(x)), wanted)


def test_nothing_is_known_of_a_tensor_from_eager_code() -> None:
    """Breaks if a shape is taken for an origin."""
    _, embed, blocks = pieces()
    tokens = embed(images()) + 0.0
    with pytest.warns(tokenpass.TokenpassWarning, match="nothing to convert"):
        blocks(tokens)
    assert not tokenpass.report(blocks).converted


def test_sizes_that_are_symbols_are_not_told() -> None:
    """Breaks if a graph for any number of images tells how many there are."""
    model, _, blocks = pieces()

    def spread(x: Tensor) -> Tensor:
        tokens: Tensor = model.patch(x).flatten(2).transpose(1, 2)
        return tokens.mean(0, keepdim=True).expand(x.shape[0], -1, -1) + 0.0

    fast = torch.compile(spread, backend=tokenpass.backend(inner="eager"))
    for batch in (2, 3):
        x = images(batch)
        torch._dynamo.mark_dynamic(x, 0)
        tokens = fast(x)
        assert torch.equal(tokens, spread(x))
        assert blocks(tokens).shape == tokens.shape


class Across(Attention):
    """Queries of one image, keys and values of another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        (q, _, _), (_, k, v) = self.project(x), self.project(y)
        return x + self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_tokens_of_two_calls_are_different_tokens() -> None:
    """Breaks if axes are told apart by how they were made and not by the call that made them."""
    _, embed, _ = pieces()
    cross = Across()
    one, other = embed(images(2)), embed(images(2).neg())
    same, different = pruned(cross), pruned(Across())
    same(one, one)
    assert tokenpass.report(same).converted
    assert torch.equal(same(one, other), cross(one, other))
    assert not tokenpass.report(same).converted
    with pytest.warns(tokenpass.TokenpassWarning, match="nothing to convert"):
        different(one, other)
    assert not tokenpass.report(different).converted


def test_a_class_token_that_is_put_back_is_the_same() -> None:
    """Breaks if the parts of an axis from another graph are not known in this one."""
    model, embed, _ = pieces()

    def rejoining(x: Tensor) -> Tensor:
        x = x + torch.cat([x[:, :1], 2 * x[:, 1:]], 1)
        for block in model.blocks:
            x = block(x)
        return x

    fast = pruned(rejoining)
    fast(embed(images()))
    assert tokenpass.report(fast).converted
    tokenpass.set_budget(fast, keep=1.0)
    tokens = embed(images())
    assert torch.equal(fast(tokens), rejoining(tokens))


# ---------------------------------------------------------------- tokens that users mark


def test_marked_tokens_are_pruned() -> None:
    """Breaks if a mark says less, or something else, than a patch embedding in the graph."""
    model, embed, blocks = pieces()
    x = images()
    tokens = embed(x) + 0.0
    found = blocks(tokenpass.mark_tokens(tokens, (4, 4), prefix=1))
    kept = tokenpass.kept(blocks)
    whole = pruned(model)
    assert torch.equal(found, whole(x))
    assert torch.equal(kept, tokenpass.kept(whole))
    assert torch.equal(blocks(tokens + 0.0), model(x))


def test_marks_lie_along_any_dimension() -> None:
    """Breaks if rows are taken for columns, or if registers behind the patches may leave."""
    stack = nn.Sequential(Block(), Block())
    tokens = torch.randn(8, 2 + 8 + 1, WIDTH)
    turned = tokenpass.mark_tokens(tokens.transpose(1, 2), (2, 4), dim=-1, prefix=2, suffix=1)
    fast = pruned(lambda x: stack(x.transpose(1, 2)))
    out = fast(turned)
    assert tokenpass.report(fast).graphs[0].grid == (2, 4)
    assert all(len(row[[0, 1, -1]].unique(dim=0)) == 3 for row in out)
    assert all(len(row[2:-1].unique(dim=0)) == 4 for row in out)


@pytest.mark.parametrize(
    ("grid", "options", "words"),
    [
        ((4, 4), {}, "17 tokens, not 0 [+] 4 x 4 [+] 0 = 16"),
        ((4, 5), {"prefix": -3}, "not -3"),
        ((-4, -4), {"prefix": 1}, "-4 x -4"),
        ((4, 4), {"prefix": 1, "dim": 3}, "has 3 dimensions"),
    ],
)
def test_wrong_marks_are_refused(grid: Any, options: Any, words: str) -> None:
    """Breaks if tokens are marked that are not there."""
    with pytest.raises(tokenpass.OptionError, match=words):
        tokenpass.mark_tokens(torch.zeros(2, 17, 8), grid, **options)


# ---------------------------------------------------------------- gates


def test_gates_in_every_graph() -> None:
    """Breaks if a graph without gates makes every frame one that is computed in full."""
    model = broken(0, 2)
    fast = gated(model, 1.0)
    for seed in range(3):
        x = images() + seed
        assert (fast(x) - model(x)).abs().max() < 1e-5
    tokenpass.set_budget(fast, keep=0.5)
    fast(images())
    fast(images() + 1)
    report, stats = tokenpass.report(fast), tokenpass.stats(fast)
    assert [bool(graph.blocks) for graph in report.graphs] == [False, True, True]
    assert not stats.computed_in_full
    assert len(stats.update_rates) == len(stats.selected) > 0
    assert all(0.5 <= rate < 1.0 for rate in stats.update_rates)
