"""What the analysis says of whole models: the grid, the prefix tokens, the tables of the tokens.

The expected answers are those of the models' own code. Breaks if a count that is equal to another
one (batch, channels of a head) leads the analysis to the wrong axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenpass
from tests import tiny
from tests.captured import Traced, trace
from tests.zoo import ENTRIES, Entry, relative_error
from tokenpass.dims import concat_axis, size_of
from tokenpass.graph import is_tensor
from tokenpass.passes.find_blocks import find_blocks
from tokenpass.passes.label_axes import label_axes
from tokenpass.proof import proof

QUICK = {"timm/vit_small_patch14_reg4_dinov2"}
MODELS = [
    pytest.param(entry, id=entry.name, marks=[] if entry.name in QUICK else [pytest.mark.slow])
    for entry in ENTRIES
]
TABLE_LINE = "constant along the token axis: "


def prefix_of(found: Traced) -> int:
    """Tokens before the grid in the token axis of the first attention."""
    grid = found.found.grid
    assert grid is not None
    layout = grid.layout(found.found.over_grid[0].key_dim)
    assert layout[-1] is None
    return sum(int(size) for size in layout[:-1] if size is not None)


def tables_of(found: Traced) -> list[Any]:
    """Values of the nodes that the proof calls constant along the token axis."""
    lines = proof(found.facts, found.found)
    names = [line.removeprefix(TABLE_LINE).split()[0] for line in lines if TABLE_LINE in line]
    values = found.values()
    nodes = {node.name: node for node in found.graph.nodes}
    return [values[nodes[name]] for name in names]


@pytest.mark.parametrize("entry", MODELS)
def test_grid_and_prefix_of_models(entry: Entry) -> None:
    found = trace(entry.build(), entry.images(2))
    assert found.found.grid is not None
    assert [int(size) for size in found.found.grid.shape] == [8, 8]
    assert prefix_of(found) == entry.prefix
    assert len(found.found.over_grid) == len(found.found.blocks) == 4
    tokens = (64, 64 + entry.prefix)
    tables = tables_of(found)
    assert tables
    assert all(any(size in tokens for size in table.shape) for table in tables)


@dataclass(frozen=True)
class Sizes:
    batch: int
    side: int
    """Patches along a side of the grid."""
    width: int
    heads: int


COLLISIONS = {
    "all different": Sizes(3, 4, 24, 2),
    "tokens are the channels of a head": Sizes(2, 4, 32, 2),
    "tokens are the batch": Sizes(16, 4, 24, 2),
    "tokens are the channels and the batch": Sizes(16, 4, 16, 1),
    "tokens are the heads": Sizes(16, 4, 64, 16),
    "64 of everything": Sizes(64, 8, 64, 1),
    "rows are the heads": Sizes(4, 4, 16, 4),
}


class Colliding(nn.Module):
    """No class token; a position table, a gain for each channel, a square weight, a bias."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        tokens, width = sizes.side**2, sizes.width
        self.sizes = sizes
        self.patch = nn.Conv2d(3, width, tiny.PATCH, tiny.PATCH)
        self.table = nn.Parameter(torch.randn(tokens, width) / 4)
        self.gain = nn.Parameter(torch.rand(width))
        self.square = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.bias = nn.Parameter(torch.randn(tokens, tokens))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT + self.table
        for qkv in self.qkv:
            heads = qkv(x).unflatten(-1, (3, self.sizes.heads, -1)).permute(2, 0, 3, 1, 4)
            scores = heads[0] @ heads[1].mT * 0.1 + self.bias
            x = x + (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2) @ self.square
            x = x + functional.gelu(x * self.gain @ self.square) @ self.square.T
        return x

    def images(self) -> Tensor:
        return tiny.images(self.sizes.batch, self.sizes.side * tiny.PATCH)


def colliding(name: str) -> Colliding:
    torch.manual_seed(3)
    return Colliding(COLLISIONS[name]).eval()


@pytest.mark.parametrize("name", COLLISIONS)
def test_equal_sizes_are_told_apart(name: str) -> None:
    model = colliding(name)
    found = trace(model, model.images())
    side = model.sizes.side
    assert found.found.grid is not None
    assert [int(size) for size in found.found.grid.shape] == [side, side]
    (convolution,) = found.nodes(torch.ops.aten.conv2d)
    assert all(factor.axis.node is convolution for factor in found.found.grid.dim)
    assert prefix_of(found) == 0
    assert len(found.found.over_grid) == len(found.found.blocks) == len(found.found.mlps) == 2
    tables = tables_of(found)
    assert len(tables) == 2
    assert any(torch.equal(table, model.table) for table in tables)
    assert any(torch.equal(table, model.bias) for table in tables)


@pytest.mark.parametrize("name", ["tokens are the heads", "64 of everything"])
def test_tokens_leave_along_the_right_axis(name: str) -> None:
    """Each image alone is the reference of the batch: nothing collides with a batch of one."""
    model = colliding(name)
    batch = model.images()
    options: dict[str, Any] = {
        "inner": "eager",
        "keep": 0.5,
        "always_rewrite": True,
        "stages": ((1, 0.5),),
    }
    fast = torch.compile(model, backend="tokenpass", options=options)
    with torch.no_grad():
        together = fast(batch)
        kept = tokenpass.kept(fast)
        assert kept.shape == (len(batch), model.sizes.side**2 // 2)
        torch._dynamo.reset()
        alone = torch.compile(model, backend="tokenpass", options=options, dynamic=False)
        for index in (0, len(batch) - 1):
            single = alone(batch[index : index + 1])
            assert tokenpass.kept(alone)[0].tolist() == kept[index].tolist()
            assert relative_error(together[index : index + 1], single) <= 1e-5


def test_the_token_axis_is_one_axis_throughout() -> None:
    """Breaks if an operation on the way renames the tokens: all attentions share one axis."""
    found = trace(tiny.encoder(depth=3), tiny.images())
    dims = {match.key_dim for match in found.found.over_grid}
    dims |= {match.query_dim for match in found.found.over_grid}
    (dim,) = dims
    axis = concat_axis(dim)
    assert axis is not None
    assert len(axis.parts) == 2


def test_names_do_not_matter() -> None:
    """Breaks if anything reads a name: nodes renamed, and stripped of all but their values."""
    plain = trace(tiny.encoder(depth=2), tiny.images())
    before = [len(block.residuals) for block in plain.found.blocks]
    shape = plain.found.grid.shape if plain.found.grid else None
    for index, node in enumerate(plain.graph.nodes):
        node._rename(f"anything_{index}")
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    found = find_blocks(label_axes(plain.graph, plain.analysis.captured.constants))
    assert found.grid is not None
    assert found.grid.shape == shape
    assert [len(block.residuals) for block in found.blocks] == before
    assert len(found.mlps) == len(found.blocks) == 2


def test_every_value_is_labelled_with_its_shape() -> None:
    """Breaks if a label of a symbolic batch is another size than the traced value has."""
    for dynamic in (False, True):
        found = trace(tiny.encoder(depth=1), tiny.images(3), dynamic=dynamic)
        for node in found.graph.nodes:
            if node.op == "output" or not is_tensor(node):
                continue
            sizes = [found.analysis.hint(size_of(dim)) for dim in found.facts.dims(node)]
            assert sizes == [int(size) for size in found.values()[node].shape], node


def test_explain_prints_the_proof() -> None:
    """Breaks if a step of the proof is missing, or what is printed does not fit 100 columns."""
    report = tokenpass.explain(tiny.encoder(depth=2), tiny.images())
    (graph,) = report.graphs
    text = "\n".join(graph.proof)
    assert "patch tokens: a grid of 4 x 4 positions of the input" in text
    assert "positions made by conv2d (2, 8, 4, 4) [tiny.py:" in text
    assert "one token axis: 1 prefix + 16 patch; dimension 2 of queries (2, 2, 17, 4)" in text
    assert TABLE_LINE in text
    assert "tokens see each other in 2 scaled_dot_product_attention" in text
    printed = str(report)
    assert all(line.strip() in printed for line in graph.proof if len(line) < 90)
    assert max(map(len, printed.splitlines())) <= 100
