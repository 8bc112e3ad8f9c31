"""At full budget the rewritten graph is the original model.

Breaks if a gather, a merge, a bias, a table look-up or a restoration moves a single token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenpass
from tests import tiny
from tests.zoo import DIFFERENT, MODELS, Entry, relative_error, tensors

OPTIONS = st.fixed_dictionaries(
    {
        "dropped": st.sampled_from(["merge", "discard"]),
        "where": st.sampled_from(["encoder", "output"]),
        "output": st.sampled_from(["restored", "pruned"]),
        "alpha": st.sampled_from([0.0, 0.1, 1.0]),
        "ranking": st.sampled_from(["received", "random"]),
    }
)


everywhere = pytest.mark.parametrize("entry", MODELS)
in_each_spelling = pytest.mark.parametrize("entry", DIFFERENT)


def compiled(model: nn.Module, *, dynamic: bool | None = None, **options: Any) -> Any:
    full = {"keep": 1.0, "always_rewrite": True, "inner": "eager", **options}
    return torch.compile(model, backend="tokenpass", options=full, dynamic=dynamic)


@everywhere
def test_outputs_equal_the_original(entry: Entry) -> None:
    model = entry.build()

    @settings(max_examples=settings().max_examples // 2)  # each compiles a model
    @given(batch=st.integers(1, 3), options=OPTIONS)
    def holds(batch: int, options: dict[str, Any]) -> None:
        torch._dynamo.reset()
        images = entry.images(batch)
        fast = compiled(model, **options)
        with torch.no_grad():
            found, expected = fast(images), model(images)
        assert tokenpass.report(fast).converted
        assert tokenpass.kept(fast).tolist() == [list(range(64))] * batch
        if options["dropped"] == "discard":
            assert all(map(torch.equal, tensors(found), tensors(expected)))
        assert relative_error(found, expected) <= 1e-5

    holds()


@pytest.mark.parametrize("dropped", ["merge", "discard"])
@in_each_spelling
def test_gradients_equal_the_original(entry: Entry, dropped: str) -> None:
    model = entry.build()
    images = entry.images(2)
    fast = compiled(model, dropped=dropped)
    gradients = []
    for function in (model, fast):
        model.zero_grad()
        torch.stack([x.square().mean() for x in tensors(function(images))]).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert tokenpass.report(fast).converted
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-4 * scale, name


TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@in_each_spelling
def test_other_dtypes(entry: Entry, dtype: torch.dtype) -> None:
    model = entry.build().to(dtype)
    images = entry.images(2).to(dtype)
    fast = compiled(model)
    with torch.no_grad():
        assert relative_error(fast(images), model(images)) <= TOLERANCES[dtype]
    assert tokenpass.report(fast).converted


@in_each_spelling
def test_under_autocast(entry: Entry) -> None:
    model, images = entry.build(), entry.images(2)
    fast = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(fast(images), model(images)) <= TOLERANCES[torch.bfloat16]
    assert tokenpass.report(fast).converted


@in_each_spelling
def test_in_inference_mode(entry: Entry) -> None:
    model, images = entry.build(), entry.images(2)
    fast = compiled(model)
    with torch.inference_mode():
        assert relative_error(fast(images), model(images)) <= 1e-5
    assert tokenpass.report(fast).converted


@pytest.mark.slow
@in_each_spelling
def test_dynamic_batch(entry: Entry) -> None:
    model = entry.build()
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch in (4, 6, 5):
            images = entry.images(batch)
            assert relative_error(fast(images), model(images)) <= 1e-5
            assert tokenpass.kept(fast).shape == (batch, 64)
    assert len(tokenpass.report(fast).graphs) == 1


class KeepsMaps(tiny.Attention):
    """Keeps its probabilities to look at."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        self.maps = maps.detach()
        out: Tensor = maps @ v
        return out


class ReturnsMaps(tiny.Encoder):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, [block.get_submodule("attention").maps for block in self.blocks]


@torch.no_grad()
def test_attention_maps_are_returned_whole() -> None:
    """Breaks if a softmax that is read twice is no attention, or if a map of the tokens that are
    left is not put back where they were, along both of its dimensions."""
    torch.manual_seed(0)
    model = ReturnsMaps([tiny.Block(KeepsMaps) for _ in range(4)])
    method = tokenpass.HiPrune(keep=1.0, dropped="discard")
    fast: Any = torch.compile(
        model, backend=tokenpass.backend(method, inner="eager", always_rewrite=True)
    )
    images = tiny.images()
    assert relative_error(tensors(fast(images)), tensors(model(images))) <= 1e-5
    tokenpass.set_budget(fast, keep=0.3)
    *_, last = tensors(fast(images))
    left = torch.zeros(2, tiny.TOKENS + 1, dtype=torch.bool)
    left[:, 0] = True
    left = left.scatter(1, tokenpass.kept(fast) + 1, True)
    sums = last.sum(-1)
    assert torch.allclose(sums, left[:, None].expand_as(sums).float(), atol=1e-6)
    assert not last.masked_select(~(left[:, None, :, None] & left[:, None, None])).any()


class Scaled(tiny.Mlp):
    """By the largest channel of each token, as an operation with one or with two results."""

    two_results = True

    def forward(self, x: Tensor) -> Tensor:
        largest = x.max(-1, keepdim=True).values if self.two_results else x.amax(-1, keepdim=True)
        return super().forward(x) * largest


class ScaledByOneResult(Scaled):
    two_results = False


@torch.no_grad()
def test_one_of_several_results() -> None:
    """Breaks if what takes one of several results is asked for the schema of an operator."""
    found = []
    for mlp in (Scaled, ScaledByOneResult):
        torch.manual_seed(0)
        model = tiny.encoder(mlp=mlp, depth=4)
        fast = compiled(model)
        images = tiny.images()
        assert relative_error(fast(images), model(images)) <= 1e-5
        assert tokenpass.report(fast).converted
        tokenpass.set_budget(fast, keep=0.3)
        found.append(fast(images))
    assert torch.equal(*found)
