"""Whatever goes wrong in tokenpass, the user's model runs: one warning, a refusal, eager's numbers.

Faults are seeded in one step after another. Breaks if a step is not guarded, if a graph with a
wrong result passes its check, or if a failure is told twice or not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import tokenpass
from tests import tiny
from tokenpass import analysis, pipeline
from tokenpass.errors import TokenpassWarning
from tokenpass.passes.prune import prune

aten = torch.ops.aten

Fault = Callable[[fx.GraphModule, fx.Node], Any]


class SeededError(Exception):
    """Raised by the tests."""


def fails(*args: Any, **kwargs: Any) -> Any:
    raise SeededError("on purpose\n\nWhile executing ...")


def compiled(**options: Any) -> tuple[Any, tiny.Encoder]:
    model = tiny.encoder(depth=1)
    full = {"inner": "eager", "keep": 0.5, "always_rewrite": True, **options}
    return torch.compile(model, backend="tokenpass", options=full), model


def held_to_account(fast: Any, model: Callable[..., Tensor], reason: str) -> None:
    """Two calls: eager's result, one warning, a refusal that gives the reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TokenpassWarning)
        with torch.no_grad():
            results = [fast(tiny.images()) for _ in range(2)]
    told = [item for item in caught if issubclass(item.category, TokenpassWarning)]
    with torch.no_grad():
        expected = model(tiny.images())
    assert all(torch.equal(result, expected) for result in results)
    assert [reason in str(item.message) for item in told] == [True]
    report = tokenpass.report(fast)
    assert not report.converted
    assert [reason in item.reason for item in report.refusals].count(True) == 1
    assert not any("\n" in item.reason for item in report.refusals)
    assert report.flops == report.flops_before
    kept = tokenpass.stats(fast)
    assert all(row.tokens_in == row.tokens_out for row in kept.blocks)


REWRITING = ["_versions", "prune", "check_rewrite", "plan_pruning", "cost_after", "proof"]
ANALYSING = ["capture", "functionalise", "label_axes", "find_blocks"]


@pytest.mark.parametrize("step", [*REWRITING, *ANALYSING])
def test_a_step_that_raises(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis if step in ANALYSING else pipeline, step, fails)
    fast, model = compiled()
    held_to_account(fast, model, "SeededError: on purpose")


def results(output: fx.Node) -> tuple[fx.Node, ...]:
    found: Any = output.args[0]
    return tuple(found)


def wrap_first(target: Any, *args: Any) -> Fault:
    """The first output goes through one more operator."""

    def fault(module: fx.GraphModule, output: fx.Node) -> Any:
        first, *rest = results(output)
        with module.graph.inserting_before(output):
            wrong = module.graph.call_function(target, (first, *args))
        return (wrong, *rest)

    return fault


def no_output(module: fx.GraphModule, output: fx.Node) -> Any:
    return results(output)[1:]


def too_few_kept(module: fx.GraphModule, output: fx.Node) -> Any:
    *rest, kept = results(output)
    with module.graph.inserting_before(output):
        fewer = module.graph.call_function(aten.slice.Tensor, (kept, 1, 1))
    return (*rest, fewer)


def malformed(module: fx.GraphModule, output: fx.Node) -> Any:
    first, *rest = results(output)
    with module.graph.inserting_after(output):
        late = module.graph.call_function(aten.neg.default, (first,))
    return (late, *rest)


WRONG: dict[str, tuple[Fault, str]] = {
    "dtype": (wrap_first(aten.to.dtype, torch.float64), "became torch.float64"),
    "fewer tokens": (wrap_first(aten.slice.Tensor, 1, 1), "dimension 1 of output"),
    "other channels": (wrap_first(aten.slice.Tensor, 2, 1), "dimension 2 of output"),
    "exchanged dimensions": (wrap_first(aten.permute.default, [0, 2, 1]), "of output"),
    "rank": (wrap_first(aten.unsqueeze.default, 0), "has 4 dimensions, had 3"),
    "missing output": (no_output, "output tensors after the rewrite"),
    "kept tokens": (too_few_kept, "number of kept tokens is 7, must be 8"),
    "order of nodes": (malformed, "undone"),
}


CASES = [(name, "restored") for name in WRONG] + [("other channels", "pruned")]


@pytest.mark.parametrize(("name", "output"), CASES)
def test_a_wrong_graph(name: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, reason = WRONG[name]

    def broken(*args: Any, **kwargs: Any) -> fx.GraphModule:
        module = prune(*args, **kwargs)
        (node,) = module.graph.find_nodes(op="output")
        node.args = (fault(module, node),)
        return module

    monkeypatch.setattr(pipeline, "prune", broken)
    fast, model = compiled(output=output)
    held_to_account(fast, model, reason)


def test_an_inner_backend_that_fails_on_the_rewritten_graph() -> None:
    model = tiny.encoder(depth=1)
    plain: list[int] = []

    def inner(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if any(node.target is aten.gather.default for node in module.graph.nodes):
            raise SeededError("on purpose")
        if any("sort" in node.name or "topk" in node.name for node in module.graph.nodes):
            raise SeededError("on purpose")
        plain.append(len(module.graph.nodes))
        return module.forward

    method = tokenpass.HiPrune(keep=0.5)
    fast = torch.compile(model, backend=tokenpass.backend(method, inner=inner, always_rewrite=True))
    held_to_account(fast, model, "SeededError: on purpose")
    assert len(plain) == 1


def test_an_inner_backend_that_always_fails_is_the_users_error() -> None:
    """Nothing is left to fall back to: the user sees the backend's own error."""
    fast = torch.compile(
        tiny.encoder(), backend=tokenpass.backend(tokenpass.HiPrune(keep=1.0), inner=fails)
    )
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="on purpose"):
        fast(tiny.images())


def test_a_budget_that_cannot_be_compiled_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a failure after ``set_budget`` reaches the caller."""
    fast, model = compiled()
    with torch.no_grad():
        fast(tiny.images())
        assert tokenpass.report(fast).converted
        monkeypatch.setattr(pipeline, "prune", fails)
        tokenpass.set_budget(fast, keep=0.25)
        held_to_account(fast, model, "SeededError: on purpose")
        monkeypatch.undo()
        tokenpass.set_budget(fast, keep=0.5)
        fast(tiny.images())
    assert tokenpass.report(fast).converted


def test_analysis_that_fails_after_a_change_of_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model = compiled()
    with torch.no_grad():
        fast(tiny.images())
    monkeypatch.setattr(pipeline, "analyse", fails)
    tokenpass.set_budget(fast, keep=0.25)
    held_to_account(fast, model, "SeededError: on purpose")


def test_nothing_to_convert_is_said_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU())
    fast = torch.compile(model, backend="tokenpass", options={"inner": "eager"})
    x = torch.randn(2, 3)
    with pytest.warns(TokenpassWarning, match="nothing to convert") as told:
        assert torch.equal(fast(x), model(x))
    assert len(told) == 1
    assert [item.reason for item in tokenpass.report(fast).refusals]
