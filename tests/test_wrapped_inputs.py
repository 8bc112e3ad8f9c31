"""Weights that wrap other tensors: they are opened, and the blocks behind them are converted.

Breaks if what is wrapped becomes a constant of the graph, is taken for something that the user
passes, or if a wrapper that needs gradients is opened and loses them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

import tokenpass
from tests import tiny
from tests.zoo import relative_error

TOLERANCE = 1e-5


class Dispatched(Tensor):
    """Twice what it wraps; operators see a plain tensor."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, wrapped: Tensor) -> Any:
        made: Any = Tensor._make_wrapper_subclass(
            cls, wrapped.shape, wrapped.stride(), dtype=wrapped.dtype, device=wrapped.device
        )
        made.wrapped = wrapped
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["wrapped"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], context: None, *sizes: Any) -> Any:
        return cls(parts["wrapped"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(func(args[0].wrapped))
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def plain(x: Any) -> Any:
    return plain(x.wrapped) + plain(x.wrapped) if isinstance(x, Dispatched) else x


class Halves(Dispatched):
    """The same, for the function of a linear layer too."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def wrapping(
    model: nn.Module, kind: type[Dispatched] = Halves, *, needs_gradients: bool = False
) -> nn.Module:
    """The model with its linear weights wrapped, one of them twice."""
    for number, layer in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
        half = layer.weight.detach() / 2
        wrapped = kind(half) if number else kind(kind(half / 2))
        layer.weight = nn.Parameter(wrapped, requires_grad=needs_gradients)
    return model


def compiled(model: nn.Module, method: Any) -> Any:
    backend = tokenpass.backend(method, inner="eager", always_rewrite=True)
    return torch.compile(model, backend=backend, dynamic=False)


METHODS = {
    "prune": tokenpass.HiPrune(keep=0.5),
    "gate": tokenpass.Eventful(keep=0.5, scene_cut=None),
}


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_wrapped_weights_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = tiny.encoder(depth=4)
    plain = compiled(copy.deepcopy(model), METHODS[name])
    fast = compiled(wrapping(model), METHODS[name])
    for _ in range(2):
        images = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
        assert relative_error(fast(images), plain(images)) <= TOLERANCE
    assert tokenpass.report(fast).converted
    assert tokenpass.report(fast).flops == tokenpass.report(plain).flops


@torch.no_grad()
def test_the_weights_of_the_call_are_used() -> None:
    """Breaks if a weight is remembered from when the graph was compiled."""
    model = wrapping(tiny.encoder(depth=4))
    fast = compiled(model, tokenpass.HiPrune(keep=1.0))
    fast(tiny.images())
    weight: Any = model.get_submodule("blocks.3.mlp.down").weight
    weight.wrapped.mul_(3)
    assert relative_error(fast(tiny.images()), model(tiny.images())) <= TOLERANCE


def test_explained_as_what_they_wrap() -> None:
    plain, wrapped = (
        tokenpass.explain(model, tiny.images())
        for model in (tiny.encoder(depth=4), wrapping(tiny.encoder(depth=4)))
    )
    assert wrapped.converted
    assert wrapped.flops == plain.flops


@pytest.mark.parametrize(("kind", "needs_gradients"), [(Halves, True), (Dispatched, False)])
def test_what_cannot_be_opened_stays(kind: type[Dispatched], needs_gradients: bool) -> None:
    """Gradients of a wrapper are wrappers; a wrapper that sees only what is dispatched cannot be
    traced before that. The model is left as it was, and the report says why."""
    torch.manual_seed(0)
    model = wrapping(tiny.encoder(depth=4), kind, needs_gradients=needs_gradients)
    fast = compiled(model, tokenpass.HiPrune(keep=0.5))
    with pytest.warns(tokenpass.TokenpassWarning, match=kind.__name__):
        found = fast(tiny.images())
    assert relative_error(found, model(tiny.images())) <= TOLERANCE
    assert not tokenpass.report(fast).converted
