"""The cost polynomial is what ``FlopCounterMode`` counts, before and after the rewrite, to 1 %.

Breaks if an operation with multiply-adds is not priced, if a rewritten graph computes on other
tokens than the plan says, or if scores and merging are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenpass
from tests import tiny
from tests.zoo import DIFFERENT, Entry
from tokenpass.methods import HiPrune

TOLERANCE = 0.01


def counted(function: Callable[..., Any], *args: Any) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function(*args)
    return int(counter.get_total_flops())


class Inner:
    """An inner backend that counts what it is given to run."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            self.flops += counted(module, *values)
            return module(*values)

        return run


def pruned(model: nn.Module, images: Tensor, **options: Any) -> tuple[tokenpass.Report, int]:
    """The report of a compiled model, and the operations of its rewritten graph."""
    inner = Inner()
    fast = torch.compile(
        model, backend=tokenpass.backend(HiPrune(**options), inner=inner, always_rewrite=True)
    )
    with torch.no_grad():
        fast(images)
    return tokenpass.report(fast), inner.flops


def near(found: int, expected: int) -> bool:
    return abs(found - expected) <= TOLERANCE * expected


@pytest.mark.slow
@pytest.mark.parametrize("entry", DIFFERENT)
def test_models(entry: Entry) -> None:
    model, images = entry.build().requires_grad_(False), entry.images(2)
    before = counted(model, images)
    for keep, dropped in ((1.0, "discard"), (0.5, "merge")):
        torch._dynamo.reset()
        report, after = pruned(model, images, keep=keep, dropped=dropped)
        assert report.converted
        assert near(report.flops_before, before)
        assert near(report.flops, after), (keep, dropped, report.flops, after)


OPTIONS: list[dict[str, Any]] = [
    {"keep": 1.0},
    {"keep": 0.5},
    {"keep": 1.0, "dropped": "discard"},
    {"keep": 0.5, "dropped": "discard"},
    {"keep": 0.5, "output": "pruned"},
    {"keep": 0.25, "dropped": "discard", "output": "pruned"},
    {"keep": 0.5, "where": "output"},
    {"keep": 3, "where": "output", "dropped": "merge"},
    {"keep": 0.5, "ranking": "random"},
    {"keep": 0.5, "ranking": "class"},
    {"stages": ((1, 0.75), (2, 0.5), (3, 0.25))},
    {"keep": 1.0, "where": "output"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any]) -> None:
    model = tiny.encoder(depth=3)
    report, after = pruned(model, tiny.images(), **options)
    assert report.converted
    assert near(report.flops_before, counted(model, tiny.images()))
    assert near(report.flops, after), (report.flops, after)


class Class(nn.Module):
    """Reads the class token only: the last block need not compute the others."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = tiny.encoder(depth=3), nn.Linear(tiny.WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x)[:, 0])
        return out


@pytest.mark.parametrize("dropped", ["merge", "discard"])
def test_a_classifier(dropped: str) -> None:
    report, after = pruned(Class().eval(), tiny.images(), keep=0.5, dropped=dropped)
    assert near(report.flops, after), (report.flops, after)
    assert report.flops < 0.85 * report.flops_before


def test_the_polynomial_is_the_number() -> None:
    """Breaks if the expression and the number come from different counts."""
    report, _ = pruned(tiny.encoder(depth=4), tiny.images(), stages=((1, 0.5), (3, 0.25)))
    n0, n1, n2 = sympy.symbols("n0 n1 n2", integer=True, positive=True)
    assert report.cost.free_symbols == {n0, n1, n2}
    assert report.cost.subs({n0: 16, n1: 8, n2: 4}) == report.flops
    assert sympy.Poly(report.cost, n0, n1, n2).total_degree() == 2
    (graph,) = report.graphs
    assert graph.cost_before.free_symbols == {n0}
    assert graph.cost_before.subs({n0: 16}) == report.flops_before


def test_the_polynomial_holds_for_other_images() -> None:
    """The tokens of a larger image, put into the polynomial of a smaller one.

    The patch embedding comes before the tokens: its cost is a number in either polynomial.
    """
    small = tokenpass.explain(tiny.encoder(depth=2), tiny.images())
    large = tokenpass.explain(
        tiny.Encoder([tiny.Block(), tiny.Block()], side=16), tiny.images(side=16)
    )
    (symbol,) = small.graphs[0].cost_before.free_symbols
    patch = 2 * 2 * 3 * tiny.PATCH**2 * tiny.WIDTH
    more = large.flops_before - small.graphs[0].cost_before.subs({symbol: 64})
    assert more == patch * (64 - 16)


def test_a_rewrite_that_does_not_pay_is_vetoed() -> None:
    """Breaks if the cost model's verdict is not heard: scores cost more than one token saves."""
    model = tiny.encoder(depth=2)
    method = HiPrune(stages=((2, 0.95),))
    refused = tokenpass.explain(model, tiny.images(), method=method)
    assert not refused.converted
    assert any("would not pay" in item.reason for item in refused.refusals)
    assert refused.flops == refused.flops_before
    assert tokenpass.explain(model, tiny.images(), method=HiPrune(stages=((1, 0.25),))).converted
