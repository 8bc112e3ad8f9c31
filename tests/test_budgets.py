"""Budgets in the user's terms, held against plans and times that are computed otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenpass
from tests import tiny
from tokenpass.budgets import BAND, for_milliseconds
from tokenpass.config import Config, as_text, read_config, within
from tokenpass.errors import OptionError
from tokenpass.methods import Method
from tokenpass.options import parse_options

SIDE = 16
TOKENS = (SIDE // tiny.PATCH) ** 2
EAGER: dict[str, Any] = {"inner": "eager", "always_rewrite": True}


def encoder() -> torch.nn.Module:
    return tiny.Encoder([tiny.Block() for _ in range(4)], side=SIDE)


def compiled_with(model: torch.nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="tokenpass", options=options)


def images(batch: int = 1) -> torch.Tensor:
    return tiny.images(batch, SIDE)


def share(method: Method) -> float:
    """FLOPs of a plan made for exactly this budget."""
    report = tokenpass.explain(encoder(), images(), method=method)
    return report.flops / report.flops_before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "target"),
    [
        (tokenpass.HiPrune(), 0.8),
        (tokenpass.HiPrune(dropped="discard"), 0.7),
        (tokenpass.HiPrune(stages=((1, 0.8), (3, 0.4))), 0.75),
        (tokenpass.Eventful(), 0.8),
    ],
    ids=["merge", "discard", "stages", "gates"],
)
def test_the_largest_budget_within_a_share(method: Method, target: float) -> None:
    """Breaks if the budget costs more than asked for, or a larger one would have done."""
    solved = tokenpass.budget_for(encoder(), images(), method=method, target_flops=target)
    assert isinstance(solved.keep, float)
    kept = round(solved.keep * TOKENS)
    assert 0 < kept < TOKENS
    assert share(solved) <= target

    def more(count: int) -> Method:
        if isinstance(method, tokenpass.HiPrune):
            return method.with_budget(count / TOKENS)
        return tokenpass.Eventful(keep=count / TOKENS)

    assert all(share(more(count)) > target for count in (kept + 1, kept + 2))


@pytest.mark.slow
def test_compiled_within_a_share() -> None:
    """Breaks if what is compiled has another budget than the one that is planned."""
    model = encoder()
    options: dict[str, Any] = {**EAGER, "target_flops": 0.8}
    fast = torch.compile(model, backend="tokenpass", options=options)
    typed = torch.compile(model, backend=tokenpass.backend(target_flops=0.8, **EAGER))
    expected = tokenpass.budget_for(model, images(), target_flops=0.8)
    assert isinstance(expected.keep, float)
    with torch.no_grad():
        for compiled in (fast, typed):
            for batch in (1, 2, 3):
                compiled(images(batch))
                assert tokenpass.kept(compiled).shape == (batch, round(expected.keep * TOKENS))
    stats = tokenpass.stats(fast)
    assert stats.flops <= 0.8 * stats.flops_before


@pytest.mark.slow
def test_gates_compiled_within_a_share() -> None:
    options = {"method": "eventful", "target_flops": 0.8, "scene_cut": None}
    fast = compiled_with(encoder(), inner="eager", **options)
    with torch.no_grad():
        for _ in range(2):
            fast(torch.randn(1, 3, SIDE, SIDE))
    stats = tokenpass.stats(fast)
    assert not stats.computed_in_full
    assert 0.4 * stats.flops_before < stats.flops <= 0.8 * stats.flops_before


def test_a_share_that_is_all() -> None:
    """Breaks if the whole budget is not the untouched model."""
    model = encoder()
    fast = compiled_with(model, target_flops=1.0, inner="eager")
    with torch.no_grad():
        assert torch.equal(fast(images()), model(images()))
    assert tokenpass.kept(fast).shape == (1, TOKENS)


def test_what_cannot_be_reached_is_said() -> None:
    """Breaks if a budget is used that costs more than asked for."""
    fast = compiled_with(encoder(), target_flops=0.05)
    with torch.no_grad(), pytest.raises(OptionError, match=r"out of reach.*still costs 0\.\d+"):
        fast(images())
    method = tokenpass.HiPrune(where="output")
    with pytest.raises(OptionError, match="runs in full"):
        tokenpass.budget_for(encoder(), images(), method=method, target_flops=0.5)


def test_a_model_that_is_left_as_it_is() -> None:
    """Breaks if a budget for a graph without tokens is an error."""
    model = torch.nn.Linear(3, 3)
    fast = compiled_with(model, **EAGER, target_flops=0.5)
    with torch.no_grad(), pytest.warns(tokenpass.TokenpassWarning, match="nothing to convert"):
        assert torch.equal(fast(torch.ones(1, 3)), model(torch.ones(1, 3)))


# ------------------------------------------------------------ milliseconds


def line(offset: float, slope: float, bend: float = 0.0) -> Callable[[float], float]:
    return lambda keep: offset + slope * keep + bend * keep * keep


@pytest.mark.parametrize("time", [line(5, 30), line(5, 10, 20), line(0, 35), line(5, 40, -10)])
def test_the_budget_for_a_time_is_close_from_below(time: Callable[[float], float]) -> None:
    """Breaks if the search ends above the target, or far below it."""
    asked: list[float] = []

    def measure(keep: float) -> float:
        asked.append(keep)
        return time(keep)

    keep = for_milliseconds(20.0, measure)
    assert (1 - 2 * BAND) * 20 <= time(keep) <= 20
    assert len(asked) <= 6


def test_times_that_need_no_search() -> None:
    assert for_milliseconds(50.0, line(5, 30)) == 1.0
    with pytest.raises(OptionError, match=r"35\.0 ms with all tokens, 8\.0 ms at keep=0\.1"):
        for_milliseconds(7.0, line(5, 30))


@pytest.mark.slow
def test_compiled_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the budget that was found is not the one that runs, or is sought in every call."""
    asked: list[float] = []

    def found(target: float, measure: Callable[[float], float]) -> float:
        assert measure(0.5) > 0
        asked.append(target)
        return 0.5

    monkeypatch.setattr("tokenpass.runtime.for_milliseconds", found)
    model = encoder()
    fast = compiled_with(model, **EAGER, target_ms=3)
    reference = compiled_with(model, **EAGER, keep=0.5)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fast(images()), reference(images()))
    assert asked == [3]
    assert tokenpass.kept(fast).shape == (1, TOKENS // 2)


# ------------------------------------------------------------ one budget, and files


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0.5, "target_flops": 0.5}, "keep=0.5 and target_flops=0.5 contradict"),
        ({"target_ms": 5, "target_flops": 0.5}, "target_flops=0.5 and target_ms=5 contradict"),
        ({"keep": 4, "target_ms": 5.0}, "keep=4 and target_ms=5.0 contradict"),
        ({"keep": 0.5, "max_loss": 1}, "keep=0.5 and max_loss=1 contradict"),
        ({"max_loss": 1}, "max_loss=1 needs measurements.*tokenpass.toml"),
        ({"method": "eventful", "threshold": 1, "target_flops": 0.5}, "threshold=1 and target_fl"),
        ({"method": "eventful", "target_ms": 5}, "LatencyTarget"),
        ({"method": tokenpass.HiPrune(keep=0.5), "target_flops": 0.5}, "keep=0.5 and target_fl"),
        ({"target_flops": 1.5}, r"target_flops=1.5: expected a share in \(0, 1\]"),
        ({"target_flops": True}, "target_flops=True"),
        ({"target_ms": 0}, "target_ms=0: expected a positive"),
    ],
)
def test_budgets_that_contradict_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_options(options)


ROWS: list[dict[str, Any]] = [
    {"keep": 0.5, "flops": 0.8, "ms": 15.0, "loss": 0.25},
    {"keep": 0.36, "flops": 0.7, "ms": None, "loss": 0.5},
    {"keep": 0.25, "flops": 0.6, "ms": 12.0, "loss": 2.0},
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tokenpass.toml"
    options = {"method": "hiprune", "inner": "eager", "keep": 0.5, "stages": None}
    path.write_text(as_text(Config(options, ROWS, {"model": 'a "b"\\c', "images": 3})))
    return path


def test_a_file_is_read_as_it_was_written(config: Path) -> None:
    found = read_config(config)
    assert found.options == {"method": "hiprune", "inner": "eager", "keep": 0.5}
    assert found.about == {"model": 'a "b"\\c', "images": 3}
    assert found.measured == [{k: v for k, v in row.items() if v is not None} for row in ROWS]


def test_a_file_is_the_options(config: Path) -> None:
    """Breaks if one of the three ways to name a file gives another budget."""
    model = encoder()
    ways: tuple[Any, ...] = (str(config), config, {"config": str(config)})
    for options in ways:
        fast = torch.compile(model, backend="tokenpass", options=options)
        with torch.no_grad():
            fast(images())
        assert tokenpass.kept(fast).shape == (1, TOKENS // 2)


def test_a_file_and_a_loss(config: Path) -> None:
    """Breaks if a dearer budget is taken than one that loses little enough."""
    keeps = {loss: parse_options({"config": config, "max_loss": loss}).method.keep
             for loss in (0.3, 0.5, 1.9, 2)}  # fmt: skip
    assert keeps == {0.3: 0.5, 0.5: 0.36, 1.9: 0.36, 2: 0.25}
    with pytest.raises(OptionError, match=r"max_loss=0.1 is not reached: .* 0.25"):
        within(read_config(config), 0.1)
    assert parse_options({"config": config, "always_rewrite": True}).always_rewrite


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("keep = 0.5", r"no table \[options\]"),
        ("[options", "no TOML"),
        ("[options]\nkeap = 1", "unknown option 'keap'"),
        ("[options]\nkeep = 2.0", "keep=2.0"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "tokenpass.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=words):
        parse_options(str(path))


def test_a_file_beside_a_budget(config: Path) -> None:
    with pytest.raises(OptionError, match=r"keep=0.5 and config='.*toml' contradict"):
        parse_options({"config": str(config), "keep": 0.5})


# ------------------------------------------------------------ what each cut did


@pytest.mark.slow
@pytest.mark.parametrize("dropped", ["merge", "discard"])
def test_cuts_are_told(dropped: str) -> None:
    """Breaks if a cut's tokens or owners are those of another cut, or change the outputs."""
    model, options = encoder(), {**EAGER, "keep": 0.25, "dropped": dropped}
    plain = compiled_with(model, **options)
    fast = compiled_with(model, **options, record_cuts=True)
    with torch.no_grad():
        assert torch.equal(plain(images(2)), fast(images(2)))
    cuts = tokenpass.cuts(fast)
    tokens = [row.tokens_out for row in tokenpass.stats(fast).blocks]
    assert [cut.kept.shape for cut in cuts] == [(2, n) for n in dict.fromkeys(tokens) if n < TOKENS]
    assert torch.equal(cuts[-1].kept, tokenpass.kept(fast))
    before = torch.arange(TOKENS).expand(2, -1)
    for cut in cuts:
        assert all(
            set(a.tolist()) <= set(b.tolist()) for a, b in zip(cut.kept, before, strict=True)
        )
        before = cut.kept
        if dropped == "discard":
            assert cut.owner is None
            continue
        assert cut.owner is not None
        for kept, owner in zip(cut.kept, cut.owner, strict=True):
            assert owner[kept].tolist() == kept.tolist()
            assert set(owner.tolist()) == set(kept.tolist())
    with pytest.raises(tokenpass.NothingRecordedError, match="record_cuts"):
        tokenpass.cuts(plain)
