"""Axis claims hold in chains of operations too, and what is not understood says so.

A rule may be right for raw axes and wrong for the products, parts, slices and rolled axes that
earlier operations leave. Breaks, for instance, if ``regroup`` splits a digit at the wrong stride or
if a slice across a border of parts keeps the name of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tests.captured import trace
from tests.soundness import violations
from tokenpass.dims import Kind, axes_of
from tokenpass.facts import What

Step = Callable[[Tensor, int], Tensor]

LARGEST = 600
"""Elements; a larger value is averaged before the next step."""


def constant(*shape: int) -> Tensor:
    count = int(torch.Size(shape).numel())
    return torch.linspace(-1.0, 1.0, count, dtype=torch.float64).reshape(shape)


def merge(x: Tensor, place: int) -> Tensor:
    return x.flatten(place, place + 1) if place + 1 < x.dim() else x


def split(x: Tensor, place: int) -> Tensor:
    return x.unflatten(place, (2, -1)) if x.shape[place] % 2 == 0 else x


def turned(x: Tensor, place: int) -> Tensor:
    return x.reshape(*reversed(x.shape))


def swapped_halves(x: Tensor, place: int) -> Tensor:
    half = x.shape[place] // 2
    return torch.cat(
        [x.narrow(place, half, x.shape[place] - half), x.narrow(place, 0, half)], place
    )


def joined_halves(x: Tensor, place: int) -> Tensor:
    half = x.shape[place] // 2
    return torch.cat(
        [x.narrow(place, 0, half), x.narrow(place, half, x.shape[place] - half)], place
    )


def prefixed(x: Tensor, place: int) -> Tensor:
    return torch.cat([constant(*x.narrow(place, 0, 1).shape), x], place)


def linear(x: Tensor, place: int) -> Tensor:
    return functional.linear(x, constant(4, x.shape[-1]))


def table(x: Tensor, place: int) -> Tensor:
    return x + constant(*x.shape[place:])


def scores(x: Tensor, place: int) -> Tensor:
    return x @ x.mT if x.dim() > 1 else x


def outer_sum(x: Tensor, place: int) -> Tensor:
    return x.unsqueeze(place) + x.unsqueeze(place + 1)


STEPS: dict[str, Step] = {
    "merge": merge,
    "split": split,
    "turned": turned,
    "swapped halves": swapped_halves,
    "joined halves": joined_halves,
    "prefixed": prefixed,
    "linear": linear,
    "table": table,
    "scores": scores,
    "outer sum": outer_sum,
    "last first": lambda x, place: x.movedim(-1, 0),
    "transposed": lambda x, place: x.transpose(place, -1),
    "first dropped": lambda x, place: (
        x.narrow(place, 1, max(1, x.shape[place] - 1) - 0) if x.shape[place] > 1 else x
    ),
    "last dropped": lambda x, place: x.narrow(place, 0, max(1, x.shape[place] - 1)),
    "first only": lambda x, place: x.select(place, 0) if x.dim() > 1 else x,
    "rolled": lambda x, place: x.roll(1, place),
    "rolled back": lambda x, place: x.roll(-1, place),
    "flipped": lambda x, place: x.flip(place),
    "twice": lambda x, place: torch.stack([x, 2 * x], place),
    "grown": lambda x, place: x.unsqueeze(place).expand(*x.shape[:place], 2, *x.shape[place:]),
    "repeated": lambda x, place: x.repeat_interleave(2, place),
    "chunks": lambda x, place: torch.cat(x.chunk(2, place), -1) if x.shape[place] % 2 == 0 else x,
    "softmax": lambda x, place: x.softmax(place),
    "norm": lambda x, place: functional.layer_norm(x, x.shape[-1:]),
    "mean": lambda x, place: x.mean(place, keepdim=True),
    "gelu": lambda x, place: functional.gelu(x),
    "padded": lambda x, place: functional.pad(x, (0, 1)),
    "looked up": lambda x, place: x.index_select(place, torch.arange(x.shape[place]).flip(0)),
}

chains = st.lists(
    st.tuples(st.sampled_from(list(STEPS)), st.integers(0, 5)), min_size=3, max_size=8
)
shapes = st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=4)


@given(chain=chains, shape=shapes, seed=st.integers(0, 99))
def test_claims_hold_in_chains(chain: list[tuple[str, int]], shape: list[int], seed: int) -> None:
    def function(x: Tensor) -> Tensor:
        for name, number in chain:
            x = STEPS[name](x, number % max(1, x.dim()))
            if x.numel() > LARGEST:
                x = x.mean(0, keepdim=True)
        return x

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    assert violations(trace(function, x)) == []


UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "sort": lambda x: x.sort(1).values,
    "topk": lambda x: x.topk(2, 1).values,
    "fft": lambda x: torch.fft.fft(x, dim=1).real,
    "cdist": lambda x: torch.cdist(x, x),
    "flat roll": lambda x: x.roll(1),
    "reflect": lambda x: functional.pad(x, (1, 1), mode="reflect"),
    "triu": lambda x: torch.triu(x),
    "mask": lambda x: x.masked_scatter(x > 0, x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_operations_are_explicit(name: str) -> None:
    """Breaks if an operation without a rule keeps an axis of its operands, or keeps silent."""
    found = trace(UNKNOWN[name], torch.randn(2, 4, 6))
    opaque = [
        (node, effect) for node, effect in found.facts.effects.items() if effect.what is What.OPAQUE
    ]
    assert opaque
    for _, effect in opaque:
        before = axes_of(dim for dims in effect.seen for dim in dims)
        after = axes_of(dim for dims in effect.outs for dim in dims)
        assert effect.note
        assert effect.mixed == before
        assert not before & after
        assert all(axis.kind is Kind.OPAQUE and axis.data for axis in after)


MIXING: dict[str, tuple[Callable[[Tensor], Any], Sequence[int]]] = {
    "cumsum": (lambda x: x.cumsum(1), [1]),
    "softmax": (lambda x: x.softmax(-1), [2]),
    "mean": (lambda x: x.mean((1, 2)), [1, 2]),
    "roll": (lambda x: x.roll((1, 1), (1, 2)), [1, 2]),
    "flip": (lambda x: x.flip(0), [0]),
    "slice": (lambda x: x[:, 1:3], [1]),
    "linear": (lambda x: functional.linear(x, torch.ones(3, 6)), [2]),
    "max pool": (lambda x: functional.max_pool1d(x, 3, 1, 1), [2]),
    "gelu": (lambda x: functional.gelu(x), []),
    "permute": (lambda x: x.permute(2, 0, 1), []),
    "prefix": (lambda x: torch.cat([torch.ones(2, 1, 6), x], 1)[:, 1:], []),
}


@pytest.mark.parametrize("name", MIXING)
def test_no_more_is_mixed_than_is(name: str) -> None:
    """Breaks if a rule gives up: soundness alone would let every operation mix everything."""
    function, places = MIXING[name]
    found = trace(function, torch.randn(2, 4, 6))
    (x,) = (n for n in found.graph.nodes if n.op == "placeholder")
    own = found.facts.dims(x)
    mixed = frozenset[Any]().union(*(e.mixed for e in found.facts.effects.values()))
    assert mixed & axes_of(own) == axes_of(own[place] for place in places)
