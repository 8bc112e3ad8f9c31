"""Encoders of packed images: rows of pixels, grids end to end, tiles.

Those of rows split their attention in Python: several graphs for each block. Breaks if rows of
pixels are not followed from graph to graph, if rows of anything else are, or if what is computed
for a token goes to another one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenpass
from tests.pieces import QUIET, fresh, gated, pruned  # noqa: F401
from tests.tiny import TOKENS, WIDTH, Attention, Block, images

pytestmark = [QUIET, pytest.mark.usefixtures("fresh")]

LENGTHS = (16, 8)
PIXELS = (3, 2, 2)


class Packed(nn.Module):
    """Patches of several images as rows; attention goes image by image, in Python.

    Args:
        rows: What makes tokens of the rows.
    """

    def __init__(self, rows: nn.Module, depth: int = 2) -> None:
        super().__init__()
        self.rows = rows
        self.blocks = nn.ModuleList(PackedBlock() for _ in range(depth))
        self.eval()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.rows(x)
        for block in self.blocks:
            x = block(x, lengths)
        return x


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patch(x.view(-1, *PIXELS)).view(-1, WIDTH)
        return tokens


class Projected(nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class PackedBlock(Block):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attend(self.norm1(x), lengths)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def attend(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in self.attention.project(x[None]))  # type: ignore[operator]
        sizes = lengths.tolist()
        parts = zip(*(part.split(sizes, 1) for part in (q, k, v)), strict=True)
        attended = [functional.scaled_dot_product_attention(*each) for each in parts]
        joint = torch.cat(attended, 1).transpose(0, 1).reshape(-1, WIDTH)
        out: Tensor = self.attention.proj(joint)  # type: ignore[operator]
        return out


def packed_rows(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(lengths), 12, generator=generator), torch.tensor(lengths)


def test_packed_rows_of_pixels_are_tokens() -> None:
    """Breaks if rows of pixels are not followed, or if a graph of an MLP is not pruned."""
    model = Packed(Convolved())
    x, lengths = packed_rows()
    fast = pruned(model, keep=1.0)
    assert torch.equal(fast(x, lengths), model(x, lengths))
    report = tokenpass.report(fast)
    assert [len(row.block.mlps) for graph in report.graphs for row in graph.blocks] == [1, 1]
    assert "none" in str(report)
    tokenpass.set_budget(fast, keep=0.5)
    assert not torch.equal(fast(x, lengths), model(x, lengths))
    assert sum(graph.changed for graph in tokenpass.report(fast).graphs) == 2
    assert tokenpass.kept(fast).shape == (1, sum(LENGTHS) // 2)


@pytest.mark.parametrize("dropped", ["merge", "discard"])
def test_tokens_keep_their_values_where_the_attention_is_elsewhere(dropped: str) -> None:
    """Breaks if an MLP's result goes to other tokens, or if a token takes more than that.

    What is merged before every block of a model would be the same token from the first one on.
    """
    model = Packed(Convolved(), depth=1)
    x, lengths = packed_rows()
    fast = pruned(model, dropped=dropped)
    found = fast(x, lengths)
    (cut,) = tokenpass.cuts(fast)
    (block,) = model.blocks
    stream = model.rows(x)
    stream = stream + block.attend(block.norm1(stream), lengths)  # type: ignore[operator]
    branch = block.mlp(block.norm2(stream))  # type: ignore[operator]
    if cut.owner is not None:
        wanted = stream + branch[cut.owner[0]]
    else:
        left = torch.zeros(len(x), 1).index_fill(0, cut.kept[0], 1.0)
        wanted = stream + left * branch
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    farthest = (stream - stream.mean(0)).norm(dim=1).topk(3).indices
    assert set(farthest.tolist()) <= set(cut.kept[0].tolist())


class Masked(Attention):
    """Attention within images, the first of half as many tokens as there are."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = torch.arange(q.shape[2]) < q.shape[2] // 2
        return functional.scaled_dot_product_attention(q, k, v, first[:, None] == first)


def test_packed_images_are_not_merged() -> None:
    """Breaks if a token leaves for one of another image where the attention is in the graph."""
    rows, block = Convolved(), Block(Masked)
    x, _ = packed_rows()
    embed = pruned(rows)
    fast = pruned(lambda tokens: block(tokens[None])[0], keep=1.0)
    wanted = block(rows(x)[None])[0]
    assert torch.allclose(fast(embed(x)), wanted, rtol=1e-6, atol=1e-6)
    assert any("several images" in refusal.reason for refusal in tokenpass.report(fast).refusals)
    tokenpass.set_budget(fast, keep=0.25)
    found = fast(embed(x))
    assert tokenpass.report(fast).converted
    assert not torch.allclose(found, wanted, atol=1e-3)
    assert len(found.unique(dim=0)) == len(x)


class EndToEnd(nn.Module):
    """Images one behind the other in one sequence.

    Args:
        prefix: Tokens before the patches.
        depth: Blocks.
    """

    def __init__(self, prefix: int, depth: int = 1) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, 2)
        self.prefix = nn.Parameter(torch.randn(prefix, WIDTH))
        self.blocks = nn.ModuleList(Block(Masked) for _ in range(depth))
        self.eval()

    def embed(self, x: Tensor) -> Tensor:
        """The images of the batch, after tokens that they share."""
        return torch.cat([self.prefix, *(grid.flatten(1).T for grid in self.patch(x))])[None]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class Tiles(EndToEnd):
    """Tiles of an image; each has tokens of its own before its patches, and padding behind."""

    def embed(self, x: Tensor) -> Tensor:
        """``(B, tiles, 3, H, W)`` to ``(B, tiles * N, C)``."""
        patches = self.patch(x.flatten(0, 1)).flatten(2).transpose(1, 2)
        prefix = self.prefix.expand(len(patches), -1, -1)
        tokens = functional.pad(torch.cat([prefix, patches], 1), (0, 0, 0, 1))
        return tokens.reshape(len(x), -1, WIDTH)


BEFORE = [False] * 2
TILE = [*BEFORE, *[True] * TOKENS, False]


@pytest.mark.parametrize(
    ("make", "prefix", "x", "patch", "reason"),
    [
        (EndToEnd, 0, images(), [True] * 2 * TOKENS, "2 grids"),
        (EndToEnd, 2, images(), BEFORE + [True] * 2 * TOKENS, "2 grids"),
        (Tiles, 2, images(4).unflatten(0, (2, 2)), TILE * 2, "concatenation"),
    ],
    ids=["grids", "prefix", "tiles"],
)
def test_several_grids_are_not_merged(
    make: type[EndToEnd], prefix: int, x: Tensor, patch: list[bool], reason: str
) -> None:
    """Breaks if tokens of two grids merge, if a result goes astray or a prefix token leaves."""
    model = make(prefix)
    (block,) = model.blocks
    fast = pruned(model, keep=1.0)
    assert torch.allclose(fast(x), model(x), rtol=1e-6, atol=1e-6)
    tokenpass.set_budget(fast, keep=0.5)
    found = fast(x)
    (cut,) = tokenpass.cuts(fast)
    report = tokenpass.report(fast)
    assert any(reason in refusal.reason for refusal in report.refusals)
    assert "32 positions of several images" in str(report)
    stream = model.embed(x)
    stream = stream + block.attention(block.norm1(stream))  # type: ignore[operator]
    branch = block.mlp(block.norm2(stream))  # type: ignore[operator]
    assert cut.owner is not None
    places = torch.tensor(patch).nonzero()[:, 0]
    for one, owner, wanted, added in zip(found, cut.owner, stream, branch, strict=True):
        source = torch.arange(len(patch)).index_copy(0, places, places[owner])
        assert torch.allclose(one, wanted + added[source], rtol=1e-6, atol=1e-6)
        assert len(owner.unique()) == TOKENS


@pytest.mark.parametrize(
    ("make", "x"),
    [(EndToEnd, images()), (Tiles, images(4).unflatten(0, (2, 2)))],
    ids=["prefix", "tiles"],
)
def test_several_grids_have_gates(make: type[EndToEnd], x: Tensor) -> None:
    """Breaks if a prefix token among several grids counts as a patch that may be left out."""
    model = make(1, depth=2)
    fast = gated(model, keep=0.25)
    fast(x)
    patches = [row.tokens_in for graph in tokenpass.report(fast).graphs for row in graph.blocks]
    assert patches == [2 * TOKENS] * 2
    tokenpass.set_budget(fast, keep=1.0)
    assert (fast(x + 1.0) - model(x + 1.0)).abs().max() < 1e-5


def test_rows_of_features_are_left_alone() -> None:
    """Breaks if any rows are taken for patches: they may be images, or hold class tokens."""
    model = Packed(Projected())
    x, lengths = packed_rows()
    with pytest.warns(tokenpass.TokenpassWarning, match="nothing to convert"):
        assert torch.equal(pruned(model)(x, lengths), model(x, lengths))


def test_another_number_of_rows_is_another_graph() -> None:
    """Breaks if a graph for rows of any number assumes one."""
    model = Packed(Convolved())
    fast = pruned(model, keep=1.0)
    for lengths in (LENGTHS, (4, 12), (8, 8, 8), (4, 4)):
        args = packed_rows(lengths)
        assert torch.equal(fast(*args), model(*args))


def test_packed_rows_have_gates() -> None:
    """Breaks if gates do not know packed rows, or if rows that changed are not found."""
    model = Packed(Convolved())
    fast = gated(model, keep=0.25)
    x, lengths = packed_rows()
    fast(x, lengths)
    changed = x.clone()
    changed[:2] += 1.0
    tokenpass.set_budget(fast, keep=1.0)
    assert (fast(changed, lengths) - model(changed, lengths)).abs().max() < 1e-5
    blocks = [row for graph in tokenpass.report(fast).graphs for row in graph.blocks]
    assert [len(row.block.mlps) for row in blocks] == [1, 1]
    assert [row.tokens_in for row in blocks] == [sum(LENGTHS)] * 2
