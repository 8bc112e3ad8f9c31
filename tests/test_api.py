"""What a compiled model can be asked, and the budget that changes at run time."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenpass
from tests import tiny
from tests.zoo import BY_NAME, DEPTH, relative_error

ENTRY = BY_NAME["timm/vit_tiny_patch16_224"]
TOKENS = 64


def compiled(model: Any, *, dynamic: bool | None = None, **options: Any) -> Any:
    options = {"inner": "eager", **options}
    return torch.compile(model, backend="tokenpass", options=options, dynamic=dynamic)


@pytest.fixture
def model() -> nn.Module:
    return ENTRY.build()


@torch.no_grad()
def test_kept_are_positions_of_the_last_call(model: nn.Module) -> None:
    """Breaks if kept() answers for another call, another batch size, or shows its own buffer."""
    fast = compiled(model, keep=0.25)
    answers: dict[int, Tensor] = {}
    for batch in (1, 3, 1):
        fast(ENTRY.images(batch))
        kept = tokenpass.kept(fast)
        assert kept.dtype == torch.int64
        assert kept.shape == (batch, TOKENS // 4)
        assert bool((kept.diff(dim=1) > 0).all())
        assert 0 <= int(kept.min()) <= int(kept.max()) < TOKENS
        assert torch.equal(answers.setdefault(batch, kept.clone()), kept)
        kept.zero_()
    assert bool((tokenpass.kept(fast)[:, 1:] > 0).all())


@torch.no_grad()
def test_stats_describe_one_call(model: nn.Module) -> None:
    """Breaks if stats add up graphs that the last call did not run."""
    fast = compiled(model, keep=0.5)
    fast(ENTRY.images(1))
    one = tokenpass.stats(fast)
    fast(ENTRY.images(3))
    three = tokenpass.stats(fast)
    assert len(one.blocks) == len(three.blocks) == DEPTH
    assert three.flops == 3 * one.flops
    assert three.flops_saved == three.flops_before - three.flops > 0
    assert one.blocks[0].tokens_in == TOKENS
    assert one.blocks[-1].tokens_out == TOKENS // 2
    entering = [row.tokens_in for row in one.blocks]
    assert entering == sorted(entering, reverse=True)


@torch.no_grad()
def test_budgets_change_without_recompilation(model: nn.Module) -> None:
    """Breaks if a budget is baked in, or if Dynamo compiles the frame anew for it."""
    images = ENTRY.images(2)
    fast = compiled(model, keep=0.5)
    fast(images)
    for keep in (0.25, 1.0, 0.5, 40):
        tokenpass.set_budget(fast, keep=keep)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = fast(images)
        expected = compiled(model, keep=keep)(images)
        assert relative_error(found, expected) <= 1e-6
        wanted = keep if isinstance(keep, int) else round(keep * TOKENS)
        assert tokenpass.kept(fast).shape == (2, wanted)
    tokenpass.reset(fast)
    fast(images)
    assert tokenpass.kept(fast).shape == (2, TOKENS // 2)


@pytest.mark.parametrize("method", [tokenpass.HiPrune(keep=0.5), tokenpass.Eventful(keep=0.5)])
@torch.no_grad()
def test_budgets_outlast_a_recompilation(method: Any) -> None:
    """Breaks if the graph that Dynamo makes for another batch goes back to its first budget."""
    model = tiny.encoder()
    fast = torch.compile(model, backend=tokenpass.backend(method, inner="eager"), dynamic=False)
    fast(tiny.images(1))
    tokenpass.set_budget(fast, keep=0.25)
    for _ in range(2):
        fast(tiny.images(3))
    if isinstance(method, tokenpass.HiPrune):
        assert tokenpass.kept(fast).shape == (3, tiny.TOKENS // 4)
    else:
        passed = {int(row) for mask in tokenpass.stats(fast).selected for row in mask.sum(1)}
        assert passed == {1 + tiny.TOKENS // 4}


@pytest.mark.slow
@torch.no_grad()
def test_a_schedule_scales_with_the_budget(model: nn.Module) -> None:
    """Breaks if a schedule of the user's own loses its proportions at another budget."""
    fast = compiled(model, stages=[(1, 0.5), (3, 0.25)])
    fast(ENTRY.images(1))
    tokenpass.set_budget(fast, keep=0.0625)
    fast(ENTRY.images(1))
    entering = [row.tokens_in for row in tokenpass.stats(fast).blocks]
    assert entering == [64, 16, 16, 4]


@pytest.mark.slow
@torch.no_grad()
def test_models_of_one_class_keep_apart() -> None:
    """Breaks if two models that share Dynamo's code share budgets or answers."""
    first, second = ENTRY.build(), ENTRY.build()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    images = ENTRY.images(2)
    fast, other = compiled(first, keep=0.25), compiled(second, keep=0.25)
    fast(images)
    kept = tokenpass.kept(fast)
    other(images)
    assert torch.equal(tokenpass.kept(fast), kept)
    assert not torch.equal(tokenpass.kept(other), kept)
    tokenpass.set_budget(other, keep=0.5)
    fast(images)
    other(images)
    assert tokenpass.kept(fast).shape == (2, 16)
    assert tokenpass.kept(other).shape == (2, 32)


@torch.no_grad()
def test_a_model_compiled_twice_has_two_budgets(model: nn.Module) -> None:
    """Breaks if what is remembered hangs on the model and not on the compiled one."""
    images = ENTRY.images(2)
    half, quarter = compiled(model, keep=0.5), compiled(model, keep=0.25)
    half(images)
    quarter(images)
    assert tokenpass.kept(half).shape == (2, 32)
    assert tokenpass.kept(quarter).shape == (2, 16)


@torch.no_grad()
def test_module_compile_in_place(model: nn.Module) -> None:
    """Breaks if only the wrapper of ``torch.compile`` is known."""
    model.compile(backend="tokenpass", options={"keep": 0.5, "inner": "eager"})
    model(ENTRY.images(2))
    assert tokenpass.kept(model).shape == (2, 32)
    assert tokenpass.report(model).converted


@torch.no_grad()
def test_a_compiled_function(model: nn.Module) -> None:
    """Breaks if only modules can be compiled."""

    def run(images: Tensor) -> Tensor:
        return model(images).softmax(-1)  # type: ignore[no-any-return]

    fast = compiled(run, keep=0.5, alpha=0.2)
    assert fast(ENTRY.images(2)).shape == (2, 10)
    assert tokenpass.kept(fast).shape == (2, 32)


def test_questions_before_the_first_call(model: nn.Module) -> None:
    """Breaks if a question without an answer gets a stale or an empty one."""
    fast = compiled(model, keep=0.5)
    for question in (tokenpass.kept, tokenpass.stats, tokenpass.report, tokenpass.reset):
        with pytest.raises(tokenpass.NothingRecordedError, match="call it once"):
            question(fast)
    with pytest.raises(tokenpass.NothingRecordedError, match="not a compiled model"):
        tokenpass.kept(model)


@pytest.mark.parametrize("keep", [0.0, 1.5, 0, -1, True, "half", None])
def test_a_bad_budget_changes_nothing(model: nn.Module, keep: Any) -> None:
    """Breaks if a bad budget is taken, or takes the good one away."""
    fast = compiled(model, keep=0.5)
    with torch.no_grad():
        fast(ENTRY.images(1))
        with pytest.raises(ValueError, match=r"keep="):
            tokenpass.set_budget(fast, keep=keep)
        fast(ENTRY.images(1))
    assert tokenpass.kept(fast).shape == (1, 32)


def test_explain_plans_and_compiles_nothing(model: nn.Module) -> None:
    """Breaks if explaining leaves anything behind, or predicts something else than happens."""
    images = ENTRY.images(2)
    report = tokenpass.explain(model, images, method=tokenpass.HiPrune(keep=0.5))
    assert (len(report.attentions), len(report.mlps), len(report.blocks)) == (4, 4, 4)
    assert report.converted
    assert isinstance(report.flops, int)
    assert report.flops < report.flops_before
    assert report.cost.free_symbols
    assert all(len(line) <= 100 for line in str(report).splitlines())
    fast = compiled(model, keep=0.5)
    with torch.no_grad():
        fast(images)
    assert tokenpass.stats(fast).flops == report.flops
    again = tokenpass.explain(fast, images, method=tokenpass.HiPrune(keep=0.5))
    assert again.flops == report.flops


def test_explain_with_a_bad_layer(model: nn.Module) -> None:
    """Breaks if an option that only the model can refute is wrapped or swallowed."""
    with pytest.raises(ValueError, match="object_layer=9"):
        tokenpass.explain(model, ENTRY.images(1), method=tokenpass.HiPrune(object_layer=9))


def test_nothing_keeps_a_model_alive() -> None:
    """Breaks if sessions hold on to models, or graphs to backends."""
    model = ENTRY.build()
    watched = weakref.ref(next(model.parameters()))
    fast = compiled(model, keep=0.5)
    with torch.no_grad():
        fast(ENTRY.images(1))
    del fast, model
    torch._dynamo.reset()
    gc.collect()
    assert watched() is None


@torch.no_grad()
def test_threads_share_a_compiled_model(model: nn.Module) -> None:
    """Breaks if a variant that one thread prepares is used half-made by another."""
    images = ENTRY.images(2)
    fast = compiled(model, keep=0.5)
    expected = fast(images)
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(fast(images))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)
