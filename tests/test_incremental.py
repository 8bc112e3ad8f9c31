"""Attention that is updated against dense attention in float64, whatever changed and how often.

Breaks if an old key is subtracted that the state does not contain, one is counted twice, a bias
lands on other keys, rounding errors pile up, a state is returned or left behind by a bad frame.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tests.attention_stream import WAYS, Stream, dense, error, exchanging, updating
from tokenpass import exchange_cost, incremental
from tokenpass.incremental import update_attention

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative to the largest output."""

BIAS_SHAPES = [(0, 0, 1, 1), (1, 0, 0, 1), (0, 1, 1, 1), (1, 1, 1, 1), (0, 0, 1, 0), (1, 1, 0, 0)]
"""Which of images, heads, queries and keys a bias has; the others are broadcast."""


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    images, groups, shared = (draw(st.integers(1, n)) for n in (2, 2, 3))
    tokens = draw(st.integers(20, 70))
    sizes = (images, groups * shared, tokens, tokens)
    has = draw(st.sampled_from(BIAS_SHAPES))
    values = torch.randn([size if own else 1 for size, own in zip(sizes, has, strict=True)])
    kinds = {"none": None, "bool": values > -0.5, "float": values, "half": values.half()}
    bias = kinds[draw(st.sampled_from(list(kinds)))]
    if bias is not None and draw(st.booleans()):
        bias = bias.expand(sizes) if draw(st.booleans()) else bias.mT.contiguous().mT
    return Stream(
        images,
        groups * shared,
        tokens,
        groups=groups,
        value_width=draw(st.sampled_from([8, 8, 4])),
        bias=bias,
        dtype=draw(st.sampled_from(list(TOLERANCES))),
        spread=draw(st.sampled_from([0.3, 1.0, 4.0])),
    )


@given(
    stream=streams(),
    way=st.sampled_from(WAYS),
    block_bytes=st.sampled_from([1, 4000, 2**24]),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
)
def test_equals_dense_attention_after_every_update(
    stream: Stream, way: str, block_bytes: int, counts: list[int]
) -> None:
    tolerance = TOLERANCES[stream.value.dtype]
    with exchanging(way, block_bytes):
        assert stream.error(stream.full()) <= tolerance
        for count in counts:
            found = stream.update(stream.some(count))
            assert found.dtype == stream.value.dtype
            assert stream.error(found) <= tolerance


@pytest.mark.parametrize("way", WAYS)
def test_most_rows_are_updated(way: str) -> None:
    """Breaks if updates silently compute everything, which is always right."""
    stream = Stream(tokens=128)
    with exchanging(way):
        stream.full()
        assert bool((stream.drift == 0).all())
        stream.update(stream.some(4))
        assert int((stream.drift > 0).sum()) >= 128 - 4 - exchange_cost.refreshed(128)
    with updating(way):
        stream.update(stream.some(100))
    assert bool((stream.drift == 0).all())


@pytest.mark.parametrize("way", WAYS)
def test_strides_do_not_matter(way: str) -> None:
    """Breaks if a fused kernel gets what it reads wrongly, such as columns in memory."""
    bias = torch.randn(2, 48, 48)
    for mask in (None, bias, bias.mT, bias[:, ::2].repeat_interleave(2, 1), bias[:, :1].mT):
        stream = Stream(2, tokens=48, bias=mask)
        for name in ("query", "key", "value"):
            setattr(stream, name, getattr(stream, name).mT.contiguous().mT)
        with exchanging(way):
            assert stream.error(stream.full()) <= 1e-5
            assert stream.error(stream.update(stream.some(4))) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_a_query_that_sees_nothing(way: str) -> None:
    """Breaks if its empty sum becomes NaN, or spreads."""
    bias = torch.rand(48, 48) > 0.3
    bias[[3, 7]] = False
    bias[:, 40:] = False
    for mask in (bias, torch.zeros(48, 48).masked_fill(~bias, -torch.inf)):
        stream = Stream(bias=mask)
        with exchanging(way):
            stream.full()
            for changed in ([[3, 9, 41]], [[44, 45, 46]], [[1, 2, 7]]):
                found = stream.update(torch.tensor(changed))
                assert bool((found[:, :, [3, 7]] == 0).all())
                assert bool((stream.state[1][:, :, [3, 7]] == -torch.inf).all())
                assert bool((stream.drift[:, 3] > 0).all()) == (3 not in changed[0])
                assert stream.error(found) <= 1e-5


def vanishing(stream: Stream) -> float:
    """Error after a key that has all the weight but a millionth of it becomes an ordinary one."""
    stream.key[:, :, 5] = stream.query.mean(2) + 14.0
    stream.query += 1.0
    stream.full()
    return stream.error(stream.update(torch.tensor([[5]])))


@pytest.mark.parametrize("way", WAYS)
def test_a_key_with_all_the_weight_vanishes(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with exchanging(way):
        assert vanishing(Stream(tokens=64)) <= 1e-5
        monkeypatch.setattr(incremental, "DRIFT_LIMIT", torch.inf)
        assert vanishing(Stream(tokens=64)) > 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_scores_grow_and_shrink_a_thousandfold(way: str) -> None:
    """Breaks if exponentials overflow. Dense float32 attention loses digits as well."""
    stream = Stream(tokens=64)
    with exchanging(way):
        stream.full()
        for factor in (1e3, 1.0, 1e3, 1e-3, -1e3, 1.0):
            changed = stream.some(5)
            rows = [torch.randn(1, 2, 5, 8) for _ in range(3)]
            found = stream.update(changed, rows[0], rows[1] * factor, rows[2])
            exact = dense(stream.query, stream.key, stream.value, stream.scale)
            single = functional.scaled_dot_product_attention(stream.query, stream.key, stream.value)
            assert error(found, exact) <= max(1e-5, 5 * error(single, exact))


@pytest.mark.parametrize("way", WAYS)
def test_sums_beyond_float32_are_not_updated(way: str) -> None:
    """Breaks if the lowest number, as a mask, swallows the scores: then all sums are the same."""
    stream = Stream(bias=torch.zeros(48, 48))
    assert stream.bias is not None
    stream.bias[4:8] = torch.finfo(torch.float32).min
    with exchanging(way):
        stream.full()
        assert stream.error(stream.update(torch.tensor([[8, 9]]))) <= 1e-5


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("way", WAYS)
def test_a_bad_frame_is_forgotten(part: str, bad: float, way: str) -> None:
    """Breaks if NaN or infinity outlives the token that brought it."""
    stream = Stream(tokens=64)
    with exchanging(way):
        stream.full()
        old = stream.put(torch.tensor([[6]]), *torch.randn(3, 1, 2, 1, 8))
        getattr(stream, part)[0, :, 6, 3] = bad
        inputs = (stream.query, stream.key, stream.value, *old, torch.tensor([[6]]))
        update_attention(*inputs, stream.scale, None, *stream.state)
        assert not bool(torch.isfinite(stream.output[:, :, 6]).all())
        stream.update(torch.tensor([[1]]))
        assert stream.error(stream.update(torch.tensor([[6]]))) <= 1e-5
        assert stream.error(stream.update(torch.tensor([[2]]))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ten_thousand_frames(way: str) -> None:
    """Breaks if errors pile up, or if frames are computed in full to get rid of them."""
    stream = Stream(heads=1, tokens=40, spread=2.0)
    worst = updated = 0.0
    with exchanging(way):
        stream.full()
        for _ in range(10_000):
            found = stream.update(stream.some(3))
            worst = max(worst, stream.error(found))
            updated += float((stream.drift > 0).float().mean())
    assert worst <= 1e-5
    assert updated / 10_000 >= 0.75


@pytest.mark.parametrize("way", WAYS)
def test_every_row_has_its_turn(way: str) -> None:
    """Breaks if the refresh is not spread over the frames, or passes over a row."""
    stream = Stream(tokens=256)
    age, each_frame = torch.zeros(256), set()
    with exchanging(way):
        stream.full()
        for _ in range(200):
            stream.update(torch.tensor([[17]]))
            fresh = stream.drift[0] == 0
            age = torch.where(fresh, 0, age + 1)
            each_frame.add(int(fresh.sum()))
            assert age.max() <= 1.25 * exchange_cost.REFRESH_FRAMES
    assert each_frame == {1 + exchange_cost.refreshed(256)}
