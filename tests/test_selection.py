"""The selection rule alone, against the plain Python of :mod:`tests.references.rule`.

Breaks if a neighbour wraps round a border or into another frame, if a tie resolves any other way
than to the lower position, if anchors leave, or if the number of kept tokens is ever not ``K``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokenpass
from tests.references import rule
from tokenpass import HiPrune, OptionError
from tokenpass.selection import anchor_count, token_budget, with_neighbours

SIDES = st.integers(1, 7)
GRIDS = st.one_of(st.tuples(SIDES, SIDES), st.tuples(st.integers(1, 3), SIDES, SIDES))
SHARES = st.floats(0.0, 1.0, exclude_min=True)
ALPHAS = st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.floats(0.0, 1.0))
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@st.composite
def scored_grids(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Object scores, deep scores and their grid; few levels, so that ties are common."""
    grid = draw(GRIDS)
    images = draw(st.integers(1, 3))
    levels = draw(st.sampled_from([1, 3, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (2, images, math.prod(grid))
    scores = torch.randint(levels, shape, generator=generator) / levels
    first, second = scores.to(draw(DTYPES))
    return first, second, grid


@st.composite
def budgets(draw: st.DrawFn, tokens: int) -> float | int:
    return draw(st.one_of(SHARES, st.integers(1, tokens)))


@given(case=scored_grids(), alpha=ALPHAS, data=st.data())
def test_equals_the_rule_in_plain_python(
    case: tuple[Tensor, Tensor, tuple[int, ...]], alpha: float, data: st.DataObject
) -> None:
    first, second, grid = case
    tokens = first.shape[1]
    keep = data.draw(budgets(tokens))
    count = max(1, round(keep * tokens)) if isinstance(keep, float) else keep
    found = tokenpass.select(HiPrune(keep=keep, alpha=alpha), first, second, grid)
    assert found.dtype == torch.int64
    assert found.shape == (len(first), count)
    assert found.tolist() == [
        rule.select(row, deep, grid, count, alpha)
        for row, deep in zip(first.tolist(), second.tolist(), strict=True)
    ]


@given(case=scored_grids(), alpha=ALPHAS, data=st.data())
def test_keeps_anchors_and_ascends(
    case: tuple[Tensor, Tensor, tuple[int, ...]], alpha: float, data: st.DataObject
) -> None:
    first, second, grid = case
    count = data.draw(st.integers(1, first.shape[1]))
    found = tokenpass.select(HiPrune(keep=count, alpha=alpha), first, second, grid)
    for row, scores in zip(found.tolist(), first.tolist(), strict=True):
        assert row == sorted(set(row))
        assert set(rule.anchor_positions(scores, count, alpha)) <= set(row)
        assert 0 <= row[0] <= row[-1] < math.prod(grid)


@given(case=scored_grids(), data=st.data())
def test_images_are_independent(
    case: tuple[Tensor, Tensor, tuple[int, ...]], data: st.DataObject
) -> None:
    first, second, grid = case
    method = HiPrune(keep=data.draw(st.integers(1, first.shape[1])), alpha=0.5)
    found = tokenpass.select(method, first, second, grid)
    alone = [
        tokenpass.select(method, first[i : i + 1], second[i : i + 1], grid)
        for i in range(len(first))
    ]
    assert torch.equal(found, torch.cat(alone))


@given(case=scored_grids())
def test_scores_are_left_alone(case: tuple[Tensor, Tensor, tuple[int, ...]]) -> None:
    first, second, grid = case
    before = first.clone(), second.clone()
    tokenpass.select(HiPrune(keep=0.5, alpha=1.0), first, second, grid)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


@given(grid=GRIDS, data=st.data())
def test_neighbours_stay_on_the_grid(grid: tuple[int, ...], data: st.DataObject) -> None:
    tokens = math.prod(grid)
    place = data.draw(st.integers(0, tokens - 1))
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    mask[0, place] = True
    found = with_neighbours(mask, grid)[0].nonzero().flatten().tolist()
    assert found == sorted({place, *rule.neighbours(place, grid)})


SEVEN = torch.arange(49.0)[None]


@pytest.mark.parametrize(
    ("anchor", "buffers"),
    [(0, [1, 7]), (6, [5, 13]), (13, [6, 12, 20]), (48, [41, 47]), (24, [17, 23, 25, 31])],
)
def test_one_anchor_and_its_buffers(anchor: int, buffers: list[int]) -> None:
    first = torch.zeros(1, 49)
    first[0, anchor] = 1.0
    count = 1 + len(buffers)
    method = HiPrune(keep=count, alpha=1.0)
    assert tokenpass.select(method, first, SEVEN, (7, 7)).tolist() == [sorted([anchor, *buffers])]


def test_frames_are_not_neighbours() -> None:
    first = torch.zeros(1, 18)
    first[0, 8] = 1.0
    deep = torch.linspace(1, 0, 18)[None]
    found = tokenpass.select(HiPrune(keep=4, alpha=1.0), first, deep, (2, 3, 3))
    assert found.tolist() == [[0, 5, 7, 8]]


def test_equal_scores_go_to_the_lower_position() -> None:
    same = torch.ones(2, 49)
    for alpha in (0.0, 0.4):
        method = HiPrune(keep=5, alpha=alpha)
        assert tokenpass.select(method, same, same, (7, 7)).tolist() == [[0, 1, 2, 3, 4]] * 2
    found = tokenpass.select(HiPrune(keep=5, alpha=1.0), same, same, (7, 7))
    assert found.tolist() == [[0, 1, 2, 3, 7]] * 2


def test_without_anchors_only_the_deep_layer_counts() -> None:
    found = tokenpass.select(HiPrune(keep=3, alpha=0.0), -SEVEN, SEVEN, (7, 7))
    assert found.tolist() == [[46, 47, 48]]


def test_too_many_buffers_are_cut_by_their_object_scores() -> None:
    first = torch.zeros(1, 49)
    first[0, [8, 26, 40]] = torch.tensor([3.0, 2.0, 1.0])
    first[0, [19, 1]] = torch.tensor([0.5, 0.4])
    found = tokenpass.select(HiPrune(keep=13, alpha=1.0), first, SEVEN, (7, 7))
    buffers = {near for anchor in (8, 26, 40) for near in rule.neighbours(anchor, (7, 7))}
    assert len(found[0]) == 13
    assert {8, 26, 40, 19, 1} <= set(found[0].tolist()) < {8, 26, 40, *buffers}


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("keep", "first"), [(1, 48), (1e-9, 48), (1.0, 0), (49, 0), (1000, 0), (48, 1)]
)
def test_extreme_budgets(keep: float, first: int, alpha: float) -> None:
    found = tokenpass.select(HiPrune(keep=keep, alpha=alpha), SEVEN, SEVEN, (7, 7))
    assert found.tolist() == [list(range(first, 49))]


@pytest.mark.parametrize(("keep", "tokens", "count"), [(0.5, 5, 2), (0.5, 7, 4), (9, 7, 7)])
def test_share_of_an_odd_number(keep: float, tokens: int, count: int) -> None:
    assert token_budget(keep, tokens) == count


@pytest.mark.parametrize(("budget", "count"), [(25, 0), (75, 2), (125, 2), (175, 4), (192, 4)])
def test_anchors_round_halves_to_even(budget: int, count: int) -> None:
    assert anchor_count(budget, 0.1) == count


@pytest.mark.parametrize(
    ("shapes", "grid", "words"),
    [
        (((1, 49), (1, 48)), (7, 7), ["(1, 49)", "(1, 48)", "(B, N)"]),
        (((49,), (49,)), (7, 7), ["(49,)", "(B, N)"]),
        (((1, 49), (1, 49)), (7, 8), ["(7, 8)", "56", "49"]),
        (((1, 49), (1, 49)), (2, 7, 7), ["(2, 7, 7)", "98", "49"]),
    ],
)
def test_shapes_that_do_not_fit(shapes: Any, grid: tuple[int, ...], words: list[str]) -> None:
    first, second = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(OptionError) as raised:
        tokenpass.select(HiPrune(keep=3), first, second, grid)
    assert isinstance(raised.value, ValueError)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("compat", [False, "llava", "qwen"])
@pytest.mark.parametrize("grid", [(49,), (), (7, 7, 1, 1)])
def test_grids_of_no_image(compat: Any, grid: tuple[int, ...]) -> None:
    method = HiPrune(keep=9, where="output", compat=compat)
    with pytest.raises(OptionError, match="grid"):
        tokenpass.select(method, SEVEN, SEVEN, grid)


def test_the_published_rule_for_one_image_checks_the_grid_too() -> None:
    method = HiPrune(keep=9, where="output", compat="llava")
    with pytest.raises(OptionError, match="56"):
        tokenpass.select(method, SEVEN, SEVEN, (7, 8))
