"""Streams: state that belongs to a video, budgets that change between frames."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn

import tokenpass
from tests.test_eventful import TOLERANCE, Encoder, eventful, gated, walk
from tests.zoo import relative_error

SHAPE = (1, 3, 16, 16)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Encoder(2, 2, 8, 1).eval()


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def clip(seed: int, frames: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(walk(torch.randn(*SHAPE, generator=generator), frames, seed))


def alone(model: nn.Module, frames: Sequence[Tensor]) -> list[Tensor]:
    fast = gated(model, eventful(keep=0.3))
    return [fast(x) for x in frames]


def test_streams_do_not_influence_one_another(model: nn.Module) -> None:
    """Breaks if two streams share a buffer."""
    fast = gated(model, eventful(keep=0.3))
    clips = [clip(seed) for seed in (1, 2)]
    wanted = [alone(model, frames) for frames in clips]
    for number in range(4):
        for name in (0, 1):
            with tokenpass.stream(fast, f"camera-{name}"):
                assert torch.equal(fast(clips[name][number]), wanted[name][number])


def test_reset_is_new(model: nn.Module) -> None:
    """Breaks if reset leaves a buffer, a budget or a stream behind."""
    fast = gated(model, eventful(keep=0.3))
    frames = clip(1)
    first = [fast(x) for x in frames]
    tokenpass.set_budget(fast, keep=0.5)
    tokenpass.reset(fast)
    assert all(torch.equal(fast(x), y) for x, y in zip(frames, first, strict=True))


def test_threads_have_streams_of_their_own(model: nn.Module) -> None:
    """Breaks if the name of a stream is global, or a frame of another stream slips in."""
    fast = gated(model, eventful(keep=0.3))
    clips = [clip(seed, 8) for seed in range(3)]
    wanted = [alone(model, frames) for frames in clips]
    found: dict[int, list[Tensor]] = {}

    def run(name: int) -> None:
        with torch.no_grad(), tokenpass.stream(fast, str(name)):
            found[name] = [fast(x) for x in clips[name]]

    fast(clips[0][0])
    threads = [threading.Thread(target=run, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in range(3):
        assert all(torch.equal(x, y) for x, y in zip(found[name], wanted[name], strict=True))


def test_budgets_change_without_recompilation(model: nn.Module) -> None:
    """Breaks if a budget is a constant of a graph: two are compiled, whatever budgets come."""
    compiled: list[fx.GraphModule] = []

    def inner(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    fast = gated(model, eventful(keep=0.3), inner)
    frames = clip(1, 8)
    fast(frames[0])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for x, keep in zip(frames[1:], (1, 2, 0.1, 0.5, 1.0, 40, 0.25), strict=True):
        tokenpass.set_budget(fast, keep=keep)
        fast(x)
        wanted = keep if isinstance(keep, int) else round(keep * 64)
        assert all(int(mask.sum()) == 1 + wanted for mask in tokenpass.stats(fast).selected)
    assert len(compiled) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_threshold_changes_at_run_time(model: nn.Module) -> None:
    """Breaks if the graph keeps the threshold that it was compiled with."""
    fast = gated(model, eventful(threshold=0.1))
    frames = clip(1)
    fast(frames[0])
    fast(frames[1])
    some = sum(tokenpass.stats(fast).update_rates)
    tokenpass.set_budget(fast, threshold=1e9)
    fast(frames[2])
    assert 0 < sum(tokenpass.stats(fast).update_rates) < some
    with pytest.raises(tokenpass.OptionError, match="without keep"):
        tokenpass.set_budget(fast, keep=0.5)


def test_outputs_do_not_alias_the_state(model: nn.Module) -> None:
    """Breaks if a returned tensor is a buffer."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = model

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            x = self.inner.embed(images).flatten(2).transpose(1, 2)
            joint = self.inner.attentions[0].qkv(x)
            return joint, joint.transpose(1, 2)

    both = [gated(Branch(), eventful(keep=0.3)) for _ in range(2)]
    for x in clip(1):
        spoiled, clean = (fast(x) for fast in both)
        assert all(torch.equal(a, b) for a, b in zip(spoiled, clean, strict=True))
        for output in spoiled:
            output.fill_(7.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_frame_does_not_poison_later_ones(model: nn.Module, bad: float) -> None:
    """Breaks if what is not finite stays in a buffer."""
    fast = gated(model, eventful(keep=0.3))
    frames = clip(1)
    fast(frames[0])
    broken = frames[1].clone()
    broken[..., :4, :4] = bad
    fast(broken)
    assert relative_error(fast(frames[2]), model(frames[2])) <= TOLERANCE
    assert tokenpass.stats(fast).computed_in_full == "the last frame was not finite"
    assert bool(fast(frames[3]).isfinite().all())


def test_gradients_are_refused(model: nn.Module) -> None:
    """Breaks if a model is trained through remembered values."""
    with torch.enable_grad(), pytest.raises(tokenpass.TokenpassError, match="no_grad"):
        gated(model, eventful(keep=0.3))(clip(1)[0])


@pytest.mark.slow
def test_inference_mode_and_no_grad_share_a_stream(model: nn.Module) -> None:
    """Breaks if state that was made in inference mode cannot be written outside of it."""
    fast, frames = gated(model, eventful(keep=0.3)), clip(1)
    wanted = alone(model, frames)
    for number, x in enumerate(frames):
        with torch.inference_mode() if number % 2 == 0 else torch.no_grad():
            assert torch.equal(fast(x.clone()), wanted[number])


def test_the_least_recently_used_stream_goes(model: nn.Module) -> None:
    """Breaks if memory grows with the number of streams that ever were."""
    fast = gated(model, eventful(keep=0.3, max_streams=2))
    x = clip(1)[0]
    for name in ("a", "b", "a"):
        with tokenpass.stream(fast, name):
            fast(x)
    size = tokenpass.stats(fast).state_bytes
    with tokenpass.stream(fast, "c"), pytest.warns(tokenpass.TokenpassWarning, match="'b'"):
        fast(x)
    assert tokenpass.stats(fast).state_bytes == size
    with tokenpass.stream(fast, "a"):
        fast(x)
    assert tokenpass.stats(fast).computed_in_full == ""


@pytest.mark.slow
def test_other_shapes_start_afresh(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    """Breaks if state of another shape is written into, or nobody is told."""
    fast = gated(model, eventful(keep=0.3))
    small = clip(1)[0]
    large = torch.nn.functional.interpolate(small, scale_factor=2)
    for x in (small, large, small.expand(2, -1, -1, -1), small):
        assert relative_error(fast(x), model(x)) <= TOLERANCE
        assert tokenpass.stats(fast).computed_in_full
        fast(x)
        assert not tokenpass.stats(fast).computed_in_full


def test_a_stream_moves(model: nn.Module) -> None:
    """Breaks if a saved state is incomplete, or is the live one."""
    frames = clip(1, 6)
    first = gated(model, eventful(keep=0.3))
    for x in frames[:3]:
        first(x)
    saved = tokenpass.state_dict(first)
    wanted = [first(x) for x in frames[3:]]
    second = gated(model, eventful(keep=0.3))
    second(frames[0])
    tokenpass.load_state_dict(second, saved, "moved")
    with tokenpass.stream(second, "moved"):
        assert all(torch.equal(second(x), y) for x, y in zip(frames[3:], wanted, strict=True))
    with pytest.raises(tokenpass.NothingRecordedError, match="moved"):
        tokenpass.state_dict(second, "unknown")


@pytest.mark.slow
def test_a_stream_is_saved_whatever_sizes_ran_before(model: nn.Module) -> None:
    """Breaks if graphs for other sizes, which have no such stream, stand in the way."""
    frames = clip(4)
    first, second = (gated(model, eventful(keep=0.3)) for _ in range(2))
    small = frames[0][..., : SHAPE[2] // 2]
    for fast in (first, second):
        fast(small)
        for x in frames[:3]:
            fast(x)
    saved = tokenpass.state_dict(first)
    wanted = first(frames[3])
    tokenpass.load_state_dict(second, saved, "moved")
    with tokenpass.stream(second, "moved"):
        assert torch.equal(second(frames[3]), wanted)


def test_an_inner_backend_that_fails_leaves_the_model_as_it_is(model: nn.Module) -> None:
    """Breaks if its error reaches the user although the unchanged model compiles."""

    def inner(module: fx.GraphModule, inputs: list[Any]) -> Any:
        if any(node.target is torch.ops.aten.copy_.default for node in module.graph.nodes):
            raise RuntimeError("no such kernel")
        return module

    backend = tokenpass.backend(eventful(keep=0.3), inner=inner, always_rewrite=True)
    fast = torch.compile(model, backend=backend)
    x = clip(1)[0]
    with pytest.warns(tokenpass.TokenpassWarning, match="no such kernel"):
        assert torch.equal(fast(x), model(x))
    assert "no such kernel" in tokenpass.report(fast).refusals[-1].reason


def test_a_cut_is_computed_in_full(model: nn.Module) -> None:
    """Breaks if motion counts as a cut, or a cut goes through gates."""
    fast = gated(model, tokenpass.Eventful(keep=0.3))
    torch.manual_seed(3)
    x = clip(1)[0]
    for place in range(4):
        x = x.clone()
        x[..., place : place + 8, place : place + 8] += 0.3
        fast(x)
    assert tokenpass.stats(fast).computed_in_full == ""
    cut = torch.randn(*SHAPE)
    assert relative_error(fast(cut), model(cut)) <= TOLERANCE
    assert tokenpass.stats(fast).computed_in_full == "scene cut"


@pytest.mark.parametrize("full", [20.0, 40.0])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_latency_is_held(full: float, noise: float) -> None:
    """Breaks if the budget swings, leaves its bounds, or settles beside the target."""
    target = tokenpass.LatencyTarget(ms=15.0, lowest=0.1, highest=0.9)
    generator = torch.Generator().manual_seed(0)
    times = []
    for number in range(200):
        load = 1.5 if number >= 100 else 1.0
        jitter = 1 + noise * (2 * float(torch.rand((), generator=generator)) - 1)
        times.append((4.0 + full * target.keep) * load * jitter)
        target.observe(times[-1])
        assert 0.1 <= target.keep <= 0.9
    for window in (times[60:100], times[160:]):
        assert max(window) <= 15.0 * (1.05 + 2 * noise)
        assert min(window) >= 15.0 * (0.85 - 2 * noise)


def test_bad_options_name_the_choices() -> None:
    """Breaks if a wrong value is taken or the message does not help."""
    for options in (
        {"keep": 0},
        {"keep": 1.5},
        {"threshold": -1},
        {"attention": "sparse"},
        {"norm": 3},
        {"scene_cut": 0},
        {"max_streams": 0},
    ):
        with pytest.raises(tokenpass.OptionError, match=next(iter(options))):
            tokenpass.Eventful(**options)


@pytest.mark.parametrize("attention", ["exact", "delta", "scores", "none"])
def test_at_full_budget_the_model_itself_runs(model: nn.Module, attention: str) -> None:
    """Breaks if a full budget pays for state, if the first frame behind gates lets anything stay
    as it was before, or if more than two graphs are compiled."""
    compiled: list[fx.GraphModule] = []

    def inner(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    def gating(keep: float, inner: Any) -> Any:
        method = tokenpass.Eventful(keep=keep, attention=cast("Any", attention), scene_cut=0.9)
        return torch.compile(model, backend=tokenpass.backend(method, inner=inner), dynamic=False)

    fast, wanted = gating(1.0, inner), gating(0.3, "eager")
    frames = clip(1, 9)
    for x in frames[:2]:
        assert torch.equal(fast(x), model(x))
        assert tokenpass.stats(fast).computed_in_full
    tokenpass.set_budget(fast, keep=0.3)
    for number, x in enumerate(frames[2:6]):
        assert relative_error(fast(x), wanted(x)) <= TOLERANCE
        found, expected = (tokenpass.stats(f).selected for f in (fast, wanted))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert bool(tokenpass.stats(fast).computed_in_full) == (number == 0)
    for x in (frames[6] * float("nan"), *frames[7:]):
        found, expected = fast(x), wanted(x)
        assert found.isnan().any() or relative_error(found, expected) <= TOLERANCE
    cut = torch.randn(SHAPE)
    for x in (cut, cut + 0.01):
        assert relative_error(fast(x), model(x)) <= TOLERANCE
        assert tokenpass.stats(fast).computed_in_full
    fast(cut)
    assert not tokenpass.stats(fast).computed_in_full
    assert len(compiled) == 2
