"""Refusals teach: what failed, at which node and line, and the change that would help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenpass
from tests import tiny
from tests.patterns.test_attention_misses import (
    Causal,
    Latent,
    NoValues,
    OverQueries,
    Pooled,
    Windows,
)
from tests.tiny import WIDTH, Block, Encoder, images
from tokenpass import Eventful, HiPrune, Report, reasons
from tokenpass.methods import Method
from tokenpass.reasons import Reason
from tokenpass.report import WIDTH as COLUMNS

HALF = HiPrune(keep=0.5)
AT_THE_OUTPUT = HiPrune(keep=0.5, where="output")


class NotAdded(Block):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.norm2(self.attention(self.norm1(x))))
        return out


class NoActivation(tiny.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x))
        return out


class TalkingBehind(tiny.Attention):
    """Probabilities of a query are smoothed over the keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = (q @ k.mT).softmax(-1)
        return (maps / maps.cumsum(-1).amax(-1, keepdim=True)) @ v


class BiasOfTheInput(tiny.Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = q.sum(-1, keepdim=True) * k.sum(-1)[:, :, None]
        return functional.scaled_dot_product_attention(q, k, v, bias)


class MixedValues(tiny.Attention):
    """Values see one another before the attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v + v.roll(1, 2))


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        x[:, 1:].mul_(2.0)
        return x


def of_parts(attention: tiny.Part = tiny.Attention, mlp: tiny.Part = tiny.Mlp) -> nn.Module:
    return tiny.encoder(attention, mlp, depth=2)


@dataclass(frozen=True)
class Case:
    """A model, what is asked for, and the reason that must be given."""

    model: Callable[[], nn.Module]
    reason: Reason
    method: Method = HALF
    prefix: int = 1


CASES = {
    "causal": Case(lambda: of_parts(Causal), reasons.CAUSAL),
    "over queries": Case(lambda: of_parts(OverQueries), reasons.OTHER_SUM),
    "no values": Case(lambda: of_parts(NoValues), reasons.NO_SUM),
    "windows": Case(lambda: Encoder([Block(Windows), Block(Windows)], prefix=0), reasons.WINDOWED),
    "pooled keys": Case(
        lambda: Encoder([Block(Pooled), Block(Pooled)], prefix=0), reasons.OTHER_KEYS
    ),
    "pooling": Case(lambda: Encoder([Block(), Block(), Latent()]), reasons.POOLING),
    "not added": Case(lambda: Encoder([NotAdded(), NotAdded()]), reasons.NOT_ADDED),
    "no activation": Case(lambda: of_parts(mlp=NoActivation), reasons.LINEAR_ONLY),
    "in place": Case(lambda: Encoder([InPlace(), InPlace()]), reasons.WRITTEN),
    "no block": Case(lambda: Encoder([NotAdded(), NotAdded()]), reasons.NO_BLOCK, AT_THE_OUTPUT),
    "probabilities": Case(lambda: of_parts(TalkingBehind), reasons.MIXED_MAPS, AT_THE_OUTPUT),
    "no class token": Case(
        lambda: Encoder([Block(), Block()], prefix=0),
        reasons.NO_CLASS_TOKEN,
        HiPrune(keep=0.5, ranking="class"),
    ),
    "partly at the output": Case(
        lambda: Encoder([Block(Windows), Block(Windows)], prefix=0),
        reasons.PARTLY_OUTPUT,
        AT_THE_OUTPUT,
    ),
    "partly, cut outputs": Case(
        lambda: Encoder([Block(Windows), Block(Windows)], prefix=0),
        reasons.PARTLY_PRUNED,
        HiPrune(keep=0.5, output="pruned"),
    ),
    "gates: bias": Case(
        lambda: of_parts(BiasOfTheInput), reasons.dense(reasons.VARYING_BIAS), Eventful()
    ),
    "gates: values": Case(
        lambda: of_parts(MixedValues), reasons.dense(reasons.SEVERAL_GATES), Eventful()
    ),
}


def explained(case: Case) -> Report:
    return tokenpass.explain(case.model(), images(1), method=case.method)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_refusal_teaches(name: str) -> None:
    """Breaks if a refusal loses its node, its line or its hint on the way to the user."""
    case = CASES[name]
    report = explained(case)
    given = [item for item in report.refusals if item.reason.endswith(case.reason)]
    assert given, [item.reason for item in report.refusals]
    for item in given:
        assert item.hint == case.reason.hint
        assert item.node
        assert "tests/" in item.stack
        assert "line" in item.place


def test_attention_behind_a_graph_break() -> None:
    """Breaks if a block whose embedding is elsewhere does not say which graph it needs."""
    report = tokenpass.explain(Block().eval(), torch.randn(2, 16, WIDTH), method=HALF)
    hints = {item.hint for item in report.refusals if "from outside the graph" in item.reason}
    assert hints == {reasons.ONE_GRAPH}


def test_pruning_that_does_not_pay() -> None:
    """Breaks if the cost model vetoes without saying what to do about it."""
    method = HiPrune(keep=16, stages=None, object_layer=2, deep_layer=2)
    report = tokenpass.explain(tiny.encoder(depth=2), images(1), method=method)
    (item,) = [item for item in report.refusals if "would not pay" in item.reason]
    assert "always_rewrite=True" in item.hint
    assert item.node
    assert item.place


def test_gates_that_do_not_pay() -> None:
    """Breaks if a layer that is too narrow for a gate gets one, or nobody is told."""
    narrow = partial(tiny.Mlp, hidden=1)
    report = tokenpass.explain(of_parts(mlp=narrow), images(1), method=Eventful(keep=0.5))
    given = [item for item in report.refusals if "costs more than it saves" in item.reason]
    assert len(given) == 2
    assert all("always_rewrite=True" in item.hint and item.node for item in given)
    assert report.converted


def test_hints_are_printed_once_for_all_that_are_alike() -> None:
    """Breaks if a table is wider than it may be, or says the same for each block."""
    model = Encoder([Block(Windows) for _ in range(6)], prefix=0)
    text = str(tokenpass.explain(model, images(1), method=HiPrune(keep=0.5, where="output")))
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert text.count("windowed attention") == 1
    assert text.count(f"-> {reasons.WINDOWED.hint}"[:30]) == 1
    assert ", +5" in text


def test_hints_are_short_and_say_something_else() -> None:
    """Breaks if a hint repeats its reason, or is too long for a table."""
    for name, reason in vars(reasons).items():
        if isinstance(reason, Reason):
            assert len(reason.hint) <= COLUMNS, name
            assert reason.hint != reason
            assert not reason.endswith(".")
