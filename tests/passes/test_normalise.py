"""One spelling for each operation, and the same numbers bit for bit.

Breaks if a decomposition mishandles a negative dimension, an uneven split or a -1, or if a spelling
reaches the axis rules that they do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.captured import trace
from tokenpass.facts import What

aten = torch.ops.aten

MOVES = {
    aten.reshape,
    aten.permute,
    aten.slice,
    aten.select,
    aten.expand,
    aten.unsqueeze,
    aten.squeeze,
    aten.cat,
    aten.clone,
}
"""What every operation that only moves elements comes out as."""

SHAPE = (4, 6, 8)

MOVING: dict[str, Callable[[Tensor], Any]] = {
    "flatten": lambda x: x.flatten(),
    "flatten last": lambda x: x.flatten(-2),
    "flatten one": lambda x: x.flatten(1, 1),
    "flatten scalar": lambda x: x[0, 0, 0].flatten(),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)),
    "unflatten in three": lambda x: x.unflatten(1, (1, 2, 3)),
    "view": lambda x: x.view(24, 8),
    "view with a rest": lambda x: x.view(4, -1),
    "view as": lambda x: x.view_as(x.reshape(8, 6, 4)),
    "reshape as": lambda x: x.mT.reshape_as(x),
    "transpose": lambda x: x.transpose(0, -1),
    "swap axes": lambda x: x.swapaxes(0, 1),
    "swap dims": lambda x: x.swapdims(-1, -2),
    "t": lambda x: x[0].t(),
    "t of a vector": lambda x: x[0, 0].t(),
    "T": lambda x: x[0].T,
    "mT": lambda x: x.mT.clone(),
    "movedim": lambda x: x.movedim(-1, 0),
    "movedim of two": lambda x: x.movedim((0, 1), (-1, 0)),
    "moveaxis": lambda x: x.moveaxis(0, -1),
    "split": lambda x: x.split(4, 1),
    "split by sizes": lambda x: x.split([1, 2, 3], 1),
    "split with sizes": lambda x: x.split_with_sizes([3, 5], -1),
    "chunk": lambda x: x.chunk(3, -1),
    "uneven chunk": lambda x: x.chunk(4, 1),
    "tensor split": lambda x: x.tensor_split(4, 1),
    "tensor split at": lambda x: x.tensor_split((1, 4), -1),
    "narrow": lambda x: x.narrow(-1, 2, 3),
    "narrow from the end": lambda x: x.narrow(1, -3, 2),
    "unbind": lambda x: x.unbind(1),
    "stack": lambda x: torch.stack([x, x], -1),
    "stack first": lambda x: torch.stack((x, x)),
    "expand as": lambda x: x[:, :1].expand_as(x),
    "broadcast to": lambda x: torch.broadcast_to(x[0], (3, 6, 8)),
    "broadcast": lambda x: torch.broadcast_tensors(x, x[:1]),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "repeat with new": lambda x: x.repeat(2, 1, 1, 1),
    "repeat of one": lambda x: x[:1].repeat(5, 1, 1),
    "tile": lambda x: x.tile(2),
    "repeat interleave": lambda x: x.repeat_interleave(3, -1),
    "repeat interleave of all": lambda x: x.repeat_interleave(2),
    "pixel shuffle": lambda x: functional.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: functional.pixel_unshuffle(x, 2),
    "dropout": lambda x: functional.dropout(x.mT, 0.5, training=False),
    "ellipsis": lambda x: x[..., None, 1:-1],
    "indices": lambda x: (x[0], x[-1, 2:], x[:, 3]),
    "iteration": lambda x: list(x),
    "concat": lambda x: torch.concat([x, x], 1),
    "vstack": lambda x: torch.vstack([x, x]),
    "hstack": lambda x: torch.hstack([x, x]),
    "ravel": lambda x: x.ravel(),
    "adjoint": lambda x: x.adjoint(),
    "unsafe chunk": lambda x: x.unsafe_chunk(2, 1),
}


def outputs(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def computed(function: Callable[[Tensor], Any], x: Tensor) -> tuple[list[Tensor], list[Any]]:
    """What the canonical graph computes, and the operators that it calls."""
    found = trace(function, x)
    (output,) = found.graph.find_nodes(op="output")
    calls = [n for n in found.graph.nodes if n.op == "call_function"]
    values = found.values()[output]
    return outputs(values), [getattr(n.target, "overloadpacket", n.target) for n in calls]


@pytest.mark.parametrize("name", MOVING)
def test_moving_elements(name: str) -> None:
    function = MOVING[name]
    x = torch.randn(SHAPE)
    found, calls = computed(function, x)
    expected = outputs(function(x))
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert set(calls) <= MOVES, set(calls) - MOVES


COMPUTING: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "einsum": (lambda x: torch.einsum("bnc,bmc->bnm", x, x), aten.bmm),
    "einsum of a vector": (lambda x: torch.einsum("bnc,bmc->nm", x, x), aten.bmm),
    "operator": (lambda x: x @ x.mT, aten.matmul),
    "functional": (lambda x: torch.linalg.matmul(x, x.mT), aten.matmul),
    "multiply": (lambda x: torch.multiply(x, x), aten.mul),
    "subtract": (lambda x: torch.subtract(x, x * 2), aten.sub),
    "divide": (lambda x: torch.divide(x, x.exp()), aten.div),
    "negative": (lambda x: torch.negative(x), aten.neg),
    "one minus": (lambda x: 1 - x, None),
    "where": (lambda x: torch.where(x > 0, x, -1e4), None),
    "where of numbers": (lambda x: torch.where(x > 0, 0.0, -1e4), None),
    "masked fill": (lambda x: x.masked_fill(x > 0, torch.tensor(1.0)), None),
    "larger": (lambda x: torch.max(x, x * 2), None),
    "constant of its kind": (lambda x: x + x.new_ones(8) - x.new_zeros(8), None),
}


@pytest.mark.parametrize("name", COMPUTING)
def test_computing(name: str) -> None:
    """Breaks if another spelling of a common operation is not understood."""
    function, operator = COMPUTING[name]
    x = torch.randn(SHAPE)
    found, calls = computed(function, x)
    assert all(map(torch.equal, found, outputs(function(x))))
    assert operator is None or operator in calls
    effects = trace(function, x).facts.effects.values()
    assert [effect.note for effect in effects if effect.what is What.OPAQUE] == []


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "same dtype": lambda x: x.to(torch.float32) * 2,
    "float": lambda x: x.float() * 2,
    "of another": lambda x: x.type_as(x) * 2,
    "dropout": lambda x: functional.dropout(x, 0.3, training=False) * 2,
    "no dropout": lambda x: functional.dropout(x, 0.0, training=True) * 2,
}


@pytest.mark.parametrize("name", CASTS)
def test_what_does_nothing_disappears(name: str) -> None:
    _, calls = computed(CASTS[name], torch.randn(SHAPE))
    assert calls == [aten.mul]


def test_what_does_something_stays() -> None:
    x = torch.randn(SHAPE)
    (half,), calls = computed(lambda x: x.to(torch.bfloat16), x)
    assert half.dtype == torch.bfloat16
    assert len(calls) == 1
    (copy,), calls = computed(lambda x: x.to(torch.float32, copy=True), x)
    assert copy.data_ptr() != x.data_ptr()
    assert len(calls) == 1
    _, calls = computed(lambda x: functional.dropout(x, 0.5, training=True), x)
    assert calls == [aten.dropout]


SYMBOLIC: dict[str, Callable[[Tensor], Any]] = {
    "flatten": lambda x: x.flatten(1),
    "flatten batch": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.flatten(0, 1).unflatten(0, (-1, 6)),
    "chunk": lambda x: x.chunk(2, -1)[0],
    "split": lambda x: x.split([2, 6], -1)[1],
    "expand": lambda x: x[:1].expand(x.shape[0], -1, -1),
    "repeat": lambda x: x[:1].repeat(x.shape[0], 1, 1),
    "transpose": lambda x: x.transpose(0, 1),
    "stack": lambda x: torch.stack([x, x], 1),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_a_symbolic_batch_stays_symbolic(name: str) -> None:
    """Breaks if a decomposition turns the batch into a number: then each batch compiles anew."""
    function = SYMBOLIC[name]
    found = trace(function, torch.randn(SHAPE), dynamic=True)
    (output,) = found.graph.find_nodes(op="output")
    (value,) = [node.meta["val"] for node in output.all_input_nodes]
    assert any(isinstance(size, torch.SymInt) for size in value.shape)
    (result,) = outputs(found.values()[output])
    assert torch.equal(result, function(torch.as_tensor(_tensor_input(found))))


def _tensor_input(found: Any) -> Tensor:
    (value,) = [value for value in found.inputs if isinstance(value, Tensor)]
    return value
