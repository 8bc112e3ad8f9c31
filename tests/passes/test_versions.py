"""On which tokens each node is computed: as few as are right, never fewer.

Breaks if a token-wise operation runs on tokens that have left, or if an operation in which tokens
see each other runs on some of them only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import tokenpass
from tests import tiny
from tests.captured import Traced, trace
from tests.zoo import relative_error
from tokenpass.methods import HiPrune
from tokenpass.passes.functionalise import written_values
from tokenpass.passes.plan_pruning import plan_pruning
from tokenpass.passes.versions import Versions, decide_versions
from tokenpass.pruning import Pruning

aten = torch.ops.aten

STAGES = ((1, 0.5), (2, 0.25))


def decided(model: nn.Module, **options: Any) -> tuple[Traced, Pruning, Versions]:
    found = trace(model.eval(), tiny.images())
    method = HiPrune(**{"stages": STAGES, **options})
    analysis = found.analysis
    plan = plan_pruning(analysis.facts, analysis.found, method, analysis.extent, analysis.hint)
    assert isinstance(plan, Pruning)
    versions = decide_versions(analysis.facts, plan, written_values(found.graph))
    return found, plan, versions


@pytest.mark.parametrize("dropped", ["merge", "discard"])
@pytest.mark.parametrize("output", ["restored", "pruned"])
def test_blocks_run_on_what_the_cuts_leave(dropped: str, output: str) -> None:
    found, plan, versions = decided(tiny.encoder(depth=4), dropped=dropped, output=output)
    levels = [versions.level[block.attention.softmax] for block in found.found.blocks]
    assert levels == [0, 1, 2, 2]
    for block, level in zip(found.found.blocks, levels, strict=True):
        for mlp in block.mlps:
            assert all(versions.level[linear] == level for linear in mlp.linears)
    assert [int(plan.count(version)) for version in range(4)] == [16, 8, 4, 0]


def test_constants_are_computed_once() -> None:
    found, _, versions = decided(tiny.encoder(depth=3))
    constants = found.analysis.captured.constants
    assert constants
    for node in constants:
        assert versions.computed.get(node, (0,)) == (0,)


def test_what_is_read_was_computed() -> None:
    """Breaks if a node waits for a version that nobody plans to make."""
    found, plan, versions = decided(tiny.encoder(depth=4), output="pruned")
    for (node, version), reads in versions.reads.items():
        assert version in versions.computed[node]
        sources = [s for s in node.all_input_nodes if s in versions.computed]
        assert len(sources) == len({s for s in node.all_input_nodes if found.facts.effects[s].outs})
        assert all(0 <= read <= plan.prefix_only for read in reads)


class ClassOnly(nn.Module):
    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.head = tiny.encoder(depth=3), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def test_a_class_token_needs_no_patch_tokens_of_the_last_block() -> None:
    found, plan, versions = decided(ClassOnly(lambda x: x[:, 0]))
    last = found.found.blocks[-1]
    assert versions.computed[last.mlps[0].linears[0]] == (plan.prefix_only,)
    first = found.found.blocks[0]
    assert plan.prefix_only not in versions.computed[first.mlps[0].linears[0]]


class Mixed(tiny.Block):
    """Does something to the tokens between attention and MLP."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.mix(x)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


SIDE = tiny.SIDE // tiny.PATCH


def grid_of(x: Tensor) -> Tensor:
    out: Tensor = x[:, 1:].mT.unflatten(2, (SIDE, SIDE))
    return out


MIXING: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "pooling": (
        lambda x: functional.pad(
            functional.avg_pool2d(grid_of(x), 3, 1, 1).flatten(2).mT, (0, 0, 1, 0)
        ),
        aten.avg_pool2d,
    ),
    "roll": (lambda x: x.roll(1, 1), aten.roll),
    "flip": (lambda x: x.flip(1), aten.flip),
    "scan": (lambda x: x.cumsum(1), aten.cumsum),
    "order": (lambda x: x.sort(1).values, aten.sort),
    "fourier": (lambda x: torch.fft.fft(x, dim=1).real, aten.fft_fft),
    "norm of tokens": (lambda x: functional.layer_norm(x.mT, x.shape[1:2]).mT, aten.layer_norm),
    "product over tokens": (lambda x: torch.ones(17, 17) @ x, aten.matmul),
    "softmax over tokens": (lambda x: x.softmax(1), aten.softmax),
    "largest": (lambda x: x - x.max(1, keepdim=True).values, aten.max),
    "batch": (lambda x: x - x.sum(0, keepdim=True), aten.sum),
    "shifted": (lambda x: functional.pad(x[:, :-1], (0, 0, 1, 0)), aten.slice),
}


UNNAMED = ("pooling", "order", "fourier")
"""Tokens lie in rows and columns there, or come out as an axis of their own."""


@pytest.mark.parametrize("name", [name for name in MIXING if name not in UNNAMED])
def test_mixing_sees_all_tokens(name: str) -> None:
    mix, operator = MIXING[name]
    model = tiny.Encoder([Mixed(mix) for _ in range(2)])
    found, _, versions = decided(model, stages=((1, 0.5),))
    grid = found.found.grid
    assert grid is not None
    alone = {norm.out for norm in found.found.norms}
    mixing = [node for node in found.nodes(operator) if _reads_tokens(found, node)]
    mixing = [node for node in mixing if node not in alone and versions.computed.get(node)]
    assert mixing
    for node in mixing:
        assert versions.computed[node] == (0,), node


def _reads_tokens(found: Traced, node: fx.Node) -> bool:
    grid = found.found.grid
    assert grid is not None
    return any(
        grid.carried_in(found.facts.dims(source))
        for source in node.all_input_nodes
        if len(found.facts.effects[source].outs) == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXING)
def test_mixing_at_full_budget_is_exact(name: str) -> None:
    mix, _ = MIXING[name]
    model = tiny.Encoder([Mixed(mix) for _ in range(2)])
    options: dict[str, Any] = {"inner": "eager", "always_rewrite": True, "stages": ((1, 1.0),)}
    fast = torch.compile(model, backend="tokenpass", options=options)
    with torch.no_grad():
        assert relative_error(fast(tiny.images()), model(tiny.images())) <= 1e-5


def test_a_cut_where_all_tokens_came_back() -> None:
    """Breaks if a cut looks for the tokens of the one before it where there are all of them.

    Each block begins with a scan, for which tokens come back with their own last value, and ends
    with a cut: nothing is lost, whatever the budget.
    """

    class Scanned(tiny.Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.cumsum(1) / 4)

    model = tiny.Encoder([Scanned() for _ in range(3)])
    options: dict[str, Any] = {"inner": "eager", "always_rewrite": True}
    options |= {
        "dropped": "discard",
        "output": "pruned",
        "stages": ((1, 0.75), (2, 0.5), (3, 0.25)),
    }
    fast = torch.compile(model, backend="tokenpass", options=options)
    with torch.no_grad():
        found, expected = fast(tiny.images()), model(tiny.images())
    kept = functional.pad(tokenpass.kept(fast) + 1, (1, 0))
    rows = expected.gather(1, kept[..., None].expand(-1, -1, tiny.WIDTH))
    assert relative_error(found, rows) <= 1e-5
    assert [row.tokens_out for row in tokenpass.stats(fast).blocks] == [12, 8, 4]
    assert tokenpass.report(fast).converted


def test_what_is_written_in_place_is_never_cut() -> None:
    """Breaks if tokens leave a stream that something writes into under another name."""

    class Writing(tiny.Block):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            x[:, :1].mul_(0.5)
            return x

    model = tiny.Encoder([Writing() for _ in range(3)])
    with torch.no_grad():
        report = tokenpass.explain(model, tiny.images(), method=tokenpass.HiPrune(keep=0.5))
    assert not report.converted
    assert any("written into in place" in item.reason for item in report.refusals)


def test_masks_and_biases_stay_whole() -> None:
    """Breaks if a table is cut where it is made, for all images alike, and not where it is read."""

    class Biased(tiny.Attention):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(2, 17, 17))

        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v, self.bias)

    found, _, versions = decided(tiny.encoder(Biased, depth=3))
    for match in found.found.over_grid:
        (mask,) = match.masks
        assert versions.level[mask.node] == 0
        assert versions.computed.get(mask.node, (0,)) == (0,)
