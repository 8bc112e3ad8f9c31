"""What reaches the inner backend: no value is read back by the host, nothing is chosen twice.

Breaks if a rewritten graph asks for a number (which stops a GPU), if a cut ranks its tokens once
for each tensor that it shortens, or if a known budget makes Dynamo or the inner backend compile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx

import tokenpass
from benchmarks.budget import KEEPS
from tests import tiny

SIDE, DEPTH, STAGES = 32, 8, ((3, 0.7), (4, 0.5), (6, 0.3))
aten = torch.ops.aten

READS_BACK = (
    "item",
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "is_nonzero",
    "equal",
)
"""Operators whose result, or its shape, the host must wait for."""

SORTS_A_CUT = 4
"""Two orders of rank, ascending positions, and the tokens that leave."""

SORTS_OF_ANCHORS = 4
"""Ranks of anchors, and of anchors and buffers."""


class Inner:
    """An inner backend that keeps the graphs that it gets."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(module)
        return module.forward


def encoder() -> tiny.Encoder:
    return tiny.Encoder([tiny.Block() for _ in range(DEPTH)], side=SIDE)


def names(module: fx.GraphModule) -> Counter[str]:
    """Base names of the operators of a graph."""
    targets = (node.target for node in module.graph.nodes if node.op == "call_function")
    return Counter(
        str(getattr(target, "overloadpacket", target)).split(".")[-1] for target in targets
    )


def compiled(method: tokenpass.HiPrune | tokenpass.Eventful) -> tuple[Any, Inner]:
    inner = Inner()
    return torch.compile(encoder(), backend=tokenpass.backend(method, inner=inner)), inner


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        tokenpass.HiPrune(keep=0.3, stages=STAGES),
        tokenpass.HiPrune(keep=0.3, dropped="discard"),
        tokenpass.HiPrune(keep=0.3, where="output"),
        tokenpass.Eventful(keep=0.25, scene_cut=None),
    ],
    ids=["merge", "discard", "output", "eventful"],
)
def test_nothing_is_read_back(method: tokenpass.HiPrune | tokenpass.Eventful) -> None:
    fast, inner = compiled(method)
    with torch.no_grad():
        for _ in range(3):
            fast(tiny.images(1, SIDE))
    assert tokenpass.report(fast).converted
    for module in inner.graphs:
        found = names(module)
        assert not found.keys() & set(READS_BACK), found


@pytest.mark.slow
def test_each_cut_chooses_once() -> None:
    """Operators that choose do not grow with the number of blocks or of tensors."""
    fast, inner = compiled(tokenpass.HiPrune(keep=0.3, stages=STAGES))
    with torch.no_grad():
        fast(tiny.images(2, SIDE))
    (module,) = inner.graphs
    found = names(module)
    cuts = len(STAGES)
    assert found["attention_received"] <= cuts + 1
    assert found["most_similar"] == cuts
    sorts = found["argsort"] + found["sort"] + found["topk"]
    assert sorts <= SORTS_A_CUT * cuts + SORTS_OF_ANCHORS


@pytest.mark.slow
def test_budgets_in_turn_compile_once_each() -> None:
    fast, inner = compiled(tokenpass.HiPrune(keep=KEEPS[0]))
    captured = torch._dynamo.utils.counters["stats"]
    before = captured["unique_graphs"]
    images = tiny.images(2, SIDE)
    with torch.no_grad():
        for keep in KEEPS:
            fast(images)
            tokenpass.set_budget(fast, keep=keep)
        fast(images)
        graphs, frames = len(inner.graphs), captured["unique_graphs"]
        for keep in (*KEEPS, *reversed(KEEPS)):
            tokenpass.set_budget(fast, keep=keep)
            fast(images)
    assert frames - before == 1
    assert (len(inner.graphs), captured["unique_graphs"]) == (graphs, frames)
    assert graphs == len(KEEPS)


@pytest.mark.slow
def test_one_token_is_not_all_tokens() -> None:
    """Breaks if budgets that compare equal, the number 1 and the share 1.0, share a graph."""
    fast, _ = compiled(tokenpass.HiPrune(keep=0.5))
    images = tiny.images(1, SIDE)
    found = []
    with torch.no_grad():
        for keep in (1, 1.0, 1):
            fast(images)
            tokenpass.set_budget(fast, keep=keep)
            fast(images)
            found.append(tokenpass.kept(fast).shape[1])
    assert found == [1, (SIDE // tiny.PATCH) ** 2, 1]
