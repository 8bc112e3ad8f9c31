"""In-place operations: made functional where nobody can tell, left alone everywhere else.

Random programs of writes, views and reads run as traced and as written. Breaks if a write through
a view is moved, if a later reader sees the old value, or if an input is no longer written to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import tokenpass
from tests import tiny
from tests.captured import Traced, trace
from tests.zoo import relative_error
from tokenpass.passes.functionalise import written_values

Program = list[tuple[str, int, int]]

WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add_": lambda x, y: x.add_(y),
    "mul_": lambda x, y: x.mul_(2.0),
    "relu_": lambda x, y: x.relu_(),
    "copy_": lambda x, y: x.copy_(y),
    "zero_": lambda x, y: x.zero_(),
    "sub_": lambda x, y: x.sub_(y, alpha=0.5),
    "fill": lambda x, y: x.fill_(0.25),
}
VIEWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "half": lambda x, y: x[: (x.shape[0] + 1) // 2],
    "mT": lambda x, y: x.mT,
    "same": lambda x, y: x.view(x.shape) if x.is_contiguous() else x,
    "row": lambda x, y: x.narrow(1, 0, 1),
}
READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "copy": lambda x, y: x.clone(),
    "sum": lambda x, y: x + y,
    "sigmoid": lambda x, y: x.sigmoid(),
}
STEPS = {**WRITES, **VIEWS, **READS}

programs = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)),
    min_size=2,
    max_size=9,
)


def run(program: Program, x: Tensor, *, input_too: bool) -> list[Tensor]:
    values = [x if input_too else x * 1.0]
    for name, first, second in program:
        a, b = values[first % len(values)], values[second % len(values)]
        if a.shape != b.shape:
            b = a.sigmoid()
        values.append(STEPS[name](a, b + 0.0))
    return [value + 0.0 for value in values]


def outputs(found: Traced, x: Tensor) -> list[Tensor]:
    """The canonical graph, run on the very tensor."""
    inputs = [x if isinstance(value, Tensor) else value for value in found.inputs]
    result: list[Tensor] = list(found.analysis.captured.module(*inputs))
    return result


@given(program=programs, input_too=st.booleans())
def test_programs_compute_the_same(program: Program, input_too: bool) -> None:
    x = torch.randn(4, 4)
    found = trace(lambda y: run(program, y, input_too=input_too), x.clone())
    mine, theirs = x.clone(), x.clone()
    results = outputs(found, mine)
    expected = run(program, theirs, input_too=input_too)
    assert torch.equal(mine, theirs)
    flat = zip(results, expected, strict=False)
    assert all(torch.equal(a, b) for a, b in flat)


def in_place(found: Traced) -> list[str]:
    return [
        node.target._schema.name.split("::")[1]
        for node in found.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]


FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "add_": lambda x: (x * 2).add_(x),
    "relu in place": lambda x: functional.relu(x * 2, inplace=True),
    "gelu then scaled": lambda x: functional.gelu(x).mul_(0.5).add_(1.0),
    "softmax of masked": lambda x: (x @ x.mT).masked_fill_(x @ x.mT > 0, -1e4).softmax(-1),
    "after a view that is not read again": lambda x: (x * 2).view(-1).mul_(3.0),
}
KEPT: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "into the input": (lambda x: x.add_(1.0), "add_"),
    "through a view": (lambda x: (lambda y: (y[:1].zero_(), y)[1])(x * 2), "zero_"),
    "with a reader under another name": (
        lambda x: (lambda y: (lambda v: (y.mul_(2.0), v + 1.0)[1])(y.mT))(x * 2),
        "mul_",
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_nobody_can_tell(name: str) -> None:
    x = torch.randn(4, 4)
    found = trace(FREE[name], x)
    assert in_place(found) == []
    assert not written_values(found.graph)
    (result,) = outputs(found, x)
    assert torch.equal(result, FREE[name](x.clone()))


@pytest.mark.parametrize("name", KEPT)
def test_somebody_can_tell(name: str) -> None:
    function, operator = KEPT[name]
    found = trace(function, torch.randn(4, 4))
    assert in_place(found) == [operator]
    (node,) = [n for n in found.graph.nodes if operator in str(n.target)]
    assert {node, node.args[0]} <= written_values(found.graph)


class InPlace(tiny.Block):
    """Adds to the stream in place, as torchvision's and many others' blocks do."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.attention(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


class Overwriting(tiny.Block):
    """Writes some tokens through a view between two blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        x[:, :1].mul_(0.5)
        return x


@pytest.mark.parametrize("block", [InPlace, Overwriting])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_models_with_writes(block: type[tiny.Block], keep: float) -> None:
    """Breaks if a value that is written to is computed for fewer tokens than it is read for."""
    model = tiny.Encoder([block(), block(), block()])
    options: dict[str, Any] = {"inner": "eager", "keep": keep, "always_rewrite": True}
    fast = torch.compile(model, backend="tokenpass", options=options)
    refused = block is Overwriting and keep < 1.0
    warned = pytest.warns(tokenpass.TokenpassWarning, match="written into in place")
    with torch.no_grad(), warned if refused else contextlib.nullcontext():
        found, expected = fast(tiny.images()), model(tiny.images())
    assert found.shape == expected.shape
    report = tokenpass.report(fast)
    if block is InPlace:
        assert report.converted
    if keep == 1.0:
        assert relative_error(found, expected) <= 1e-5
    elif report.converted:
        assert relative_error(found, expected) > 1e-3
