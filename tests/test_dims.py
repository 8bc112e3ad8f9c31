"""Dimensions as products of digits behave as tensors do.

The reference is torch: each digit becomes a tensor of its values, which is reshaped, concatenated,
sliced and rolled. Breaks if ``regroup`` splits a factor at the wrong stride, if neighbouring digits
merge that are not contiguous, or if parts of a concatenation come back in the wrong place.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tokenpass.dims import (
    ONE,
    ZERO,
    Axis,
    AxisTable,
    Dim,
    Factor,
    Kind,
    canonical,
    is_data,
    parts_of,
    quotient,
    regroup,
    same,
    size_of,
    whole,
)


def axis(size: int | sympy.Expr, *, data: bool = True) -> Axis:
    return Axis(Kind.INPUT, sympy.sympify(size), None, data)


def digit(source: Axis, stride: int, size: int) -> Factor:
    return Factor(source, sympy.Integer(stride), sympy.Integer(size))


def sizes_of(dims: list[Dim]) -> list[int]:
    return [int(size_of(dim)) for dim in dims]


@dataclass(frozen=True)
class Example:
    """Dimensions that hold every digit of some axes once, and a shape of the same total."""

    dims: list[Dim]
    shape: list[int]

    def indices(self) -> dict[Axis, Tensor]:
        """For each axis, its index at every element of a tensor with these dimensions."""
        factors = [factor for dim in self.dims for factor in dim]
        fine = [int(factor.size) for factor in factors]
        found: dict[Axis, Tensor] = {}
        for place, factor in enumerate(factors):
            along = [-1 if p == place else 1 for p in range(len(fine))]
            values = (torch.arange(fine[place]) * int(factor.stride)).reshape(along).expand(fine)
            found[factor.axis] = (
                found.get(factor.axis, torch.zeros(fine, dtype=torch.long)) + values
            )
        return {key: value.reshape(self.shape) for key, value in found.items()}


@st.composite
def examples(draw: Any) -> Example:
    factors: list[Factor] = []
    for _ in range(draw(st.integers(1, 3))):
        pieces = draw(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=3))
        source = axis(prod(pieces))
        strides = [prod(pieces[place + 1 :]) for place in range(len(pieces))]
        factors += [digit(source, s, n) for s, n in zip(strides, pieces, strict=True)]
    if draw(st.booleans()):
        factors = draw(st.permutations(factors))
    cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=3)))
    borders = [0, *cuts, len(factors)]
    dims = [canonical(factors[a:b]) for a, b in pairwise(borders)]
    return Example(dims, draw(shapes_of(prod(sizes_of(dims)))))


@st.composite
def shapes_of(draw: Any, total: int) -> list[int]:
    shape: list[int] = []
    while total > 1:
        size = draw(st.sampled_from([n for n in range(total, 0, -1) if total % n == 0]))
        shape.append(size)
        total //= size
    return shape or [1]


@given(example=examples())
def test_regroup_does_what_reshape_does(example: Example) -> None:
    found, lost = regroup(example.dims, [sympy.Integer(size) for size in example.shape])
    indices = example.indices()
    assert len(found) == len(example.shape)
    for place, (dim, size) in enumerate(zip(found, example.shape, strict=True)):
        if dim is None:
            continue
        assert int(size_of(dim)) == size
        position = torch.zeros(example.shape, dtype=torch.long)
        for factor in dim:
            value = indices[factor.axis] // int(factor.stride) % int(factor.size)
            position = position * int(factor.size) + value
        along = [-1 if p == place else 1 for p in range(len(example.shape))]
        assert torch.equal(position, torch.arange(size).reshape(along).expand(example.shape))
    held = {factor.axis for dim in found if dim is not None for factor in dim}
    everything = {factor.axis for dim in example.dims for factor in dim}
    assert held | lost == everything
    assert bool(lost) == (None in found)


@given(example=examples())
def test_regroup_to_digits_and_back_loses_nothing(example: Example) -> None:
    factors = [factor for dim in example.dims for factor in dim]
    fine, lost = regroup(example.dims, [factor.size for factor in factors])
    assert fine == [(factor,) for factor in factors]
    assert not lost
    dims = [dim for dim in fine if dim is not None]
    back, lost = regroup(dims, [size_of(dim) for dim in example.dims])
    assert back == example.dims
    assert not lost


@given(example=examples())
def test_canonical_keeps_meaning_and_stays(example: Example) -> None:
    flat = [factor for dim in example.dims for factor in dim]
    merged = canonical(flat)
    assert canonical(merged) == merged
    assert size_of(merged) == prod(example.shape)
    for first, second in pairwise(merged):
        contiguous = first.stride == second.stride * second.size
        assert not (first.axis is second.axis and contiguous)


def test_digits_of_two_axes_never_merge() -> None:
    first, second = axis(6), axis(6)
    low, high = digit(first, 1, 2), digit(second, 2, 3)
    assert canonical([high, low]) == (high, low)
    assert canonical([digit(first, 2, 3), low]) == whole(first)
    assert canonical([low, digit(first, 2, 3)]) == (low, digit(first, 2, 3))
    assert whole(first) != whole(second)


def test_regroup_of_symbols() -> None:
    """Breaks if a symbolic batch stops a reshape from being understood."""
    batch, tokens = sympy.symbols("b n", positive=True, integer=True)
    b, n, c = whole(axis(batch)), whole(axis(tokens)), whole(axis(12))
    found, lost = regroup([b, n, c], [batch * tokens, sympy.Integer(3), sympy.Integer(4)])
    assert not lost
    assert found[0] == (*b, *n)
    assert [int(size_of(dim or ())) for dim in found[1:]] == [3, 4]
    back, lost = regroup([dim for dim in found if dim is not None], [batch, tokens, 12 * ONE])
    assert (back, lost) == ([b, n, c], set())
    lost_dims, lost = regroup([b, n], [tokens, batch])
    assert lost_dims == [None, None]
    assert lost == {b[0].axis, n[0].axis}


def test_quotient_divides_for_every_value() -> None:
    b, n = sympy.symbols("b n", positive=True, integer=True)
    assert quotient(sympy.Integer(12), sympy.Integer(4)) == 3
    assert quotient(sympy.Integer(12), sympy.Integer(5)) is None
    assert quotient(b * n, n) == b
    assert quotient(b, n) is None
    assert quotient(b, ZERO) is None
    assert same((b + 1) * n, b * n + n)
    assert not same(b, n)


# ------------------------------------------------------------ concatenation, slices, rolls


@st.composite
def part_sizes(draw: Any) -> list[int]:
    sizes: list[int] = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    assume(len(sizes) > sizes.count(1))
    return sizes


def places(dim: Dim) -> list[tuple[Axis, int]]:
    """The position in a raw axis that each position of ``dim`` stands for."""
    if not dim:
        return [(NOWHERE, 0)]
    (factor,) = dim
    own = factor.axis
    if own.kind is Kind.CONCAT:
        return [position for part in own.parts for position in places(part)]
    if own.kind is Kind.SLICE:
        start = int(own.offset)
        return places(own.source)[start : start + int(own.size)]
    if own.kind is Kind.ROLL:
        source = places(own.source)
        return [source[(p - int(own.offset)) % len(source)] for p in range(len(source))]
    return [(own, p) for p in range(int(own.size))]


NOWHERE = axis(1)


@given(sizes=part_sizes(), data=st.data())
def test_slices_of_a_concatenation(sizes: list[int], data: st.DataObject) -> None:
    table = AxisTable()
    parts = [whole(axis(size)) for size in sizes]
    laid = table.concat(parts, None)
    start = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.integers(start + 1, sum(sizes)))
    taken = table.slice(laid, sympy.Integer(start), sympy.Integer(stop), None)
    wanted = places(laid)[start:stop]
    assert len(places(taken)) == len(wanted)
    pairs = zip(places(taken), wanted, strict=True)
    assert all(place == expected or place[0] is NOWHERE for place, expected in pairs)
    assert table.slice(laid, sympy.Integer(start), sympy.Integer(stop), None) == taken
    bounds = [0, start, stop, sum(sizes)]
    cuts = [(a, b) for a, b in pairwise(bounds) if a < b]
    slices = [table.slice(laid, sympy.Integer(a), sympy.Integer(b), None) for a, b in cuts]
    if not leaves_one(sizes, bounds):
        assert places(taken) == wanted
        assert table.concat(slices, None) == laid


def leaves_one(sizes: list[int], bounds: list[int]) -> bool:
    """Whether a cut leaves a single position of a longer part: that has no axis any more."""
    borders = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    pieces = pairwise(sorted({*borders, *bounds}))
    return any(b - a == 1 and not (a in borders and b in borders) for a, b in pieces)


@given(sizes=part_sizes())
def test_slices_at_borders_give_the_parts(sizes: list[int]) -> None:
    table = AxisTable()
    parts = tuple(whole(axis(size)) for size in sizes)
    laid = table.concat(parts, None)
    assert parts_of(laid) == parts
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        stop = start + size
        assert table.slice(laid, sympy.Integer(start), sympy.Integer(stop), None) == part
        start = stop


@given(sizes=part_sizes())
def test_concatenation_does_not_nest(sizes: list[int]) -> None:
    table = AxisTable()
    parts = [whole(axis(size)) for size in sizes]
    nested = table.concat([table.concat(parts[:-1], None), parts[-1]], None)
    assert nested == table.concat(parts, None)
    assert int(size_of(nested)) == sum(sizes)


@given(sizes=st.lists(st.integers(2, 5), min_size=2, max_size=2), before=st.integers(0, 3))
def test_slices_of_slices(sizes: list[int], before: int) -> None:
    table = AxisTable()
    start, middle, stop = before, before + sizes[0], before + sum(sizes)
    dim = whole(axis(stop + 1))
    outer = table.slice(dim, sympy.Integer(start), sympy.Integer(stop), None)
    cut = sympy.Integer(sizes[0])
    left = table.slice(outer, ZERO, cut, None)
    right = table.slice(outer, cut, sympy.Integer(sum(sizes)), None)
    assert places(left) == places(dim)[start:middle]
    assert places(right) == places(dim)[middle:stop]
    assert table.concat([left, right], None) == outer
    assert table.concat([right, left], None) != outer


@given(size=st.integers(2, 9), shift=st.integers(-9, 9), other=st.integers(-9, 9))
def test_rolls(size: int, shift: int, other: int) -> None:
    table = AxisTable()
    dim = whole(axis(size))
    rolled = table.roll(dim, sympy.Integer(shift), None)
    index = torch.arange(size).roll(shift).tolist()
    assert [position for _, position in places(rolled)] == index
    assert table.roll(rolled, sympy.Integer(-shift), None) == dim
    twice = table.roll(rolled, sympy.Integer(other), None)
    assert places(twice) == [places(rolled)[p] for p in torch.arange(size).roll(other).tolist()]


@pytest.mark.parametrize("data", [False, True])
def test_what_is_made_of_data_is_data(data: bool) -> None:
    table = AxisTable()
    dim = whole(axis(4, data=data))
    constant = whole(axis(4, data=False))
    assert is_data(table.slice(dim, ZERO, sympy.Integer(2), None)) is data
    assert is_data(table.roll(dim, ONE, None)) is data
    assert is_data(table.concat([constant, dim], None)) is data


def test_each_table_makes_an_axis_once() -> None:
    """Breaks if the same construction at two places of a graph gives two token axes."""
    first, second = whole(axis(3)), whole(axis(4))
    table = AxisTable()
    assert table.concat([first, second], None) == table.concat([first, second], None)
    assert table.concat([second, first], None) != table.concat([first, second], None)


@pytest.mark.parametrize("cut", [1, 2])
def test_prefix_tokens_that_are_split_and_put_together(cut: int) -> None:
    """Breaks if three prefix tokens of one parameter are others than three on their own."""
    table, patches = AxisTable(), whole(axis(16))
    together = table.concat([whole(axis(3, data=False)), patches], None)
    each = table.concat([(), (), (), patches], None)
    at = sympy.Integer(cut)
    halves = (table.slice(together, *ends, None) for ends in ((ZERO, at), (at, sympy.Integer(19))))
    assert table.concat(list(halves), None) == together == each
