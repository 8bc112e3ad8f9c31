"""What the tokens that stay do not need is not computed, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import tokenpass
from tests.vlm.families import FAMILIES, prompts
from tests.vlm.reference import masked_logits, staying
from tests.vlm.test_families import kept_by_image
from tokenpass import HiPrune
from tokenpass.passes.row_wise import treats_rows_alone

NUMBERS = [1, 0, 2]

LINE_ENDS = {"llava_next": 24, "llava_onevision": 24}
"""Tokens of three images that no encoder computes."""

CELL = {"gemma3": 4}
"""Patches of a visual token, where the last linear layer runs on patches."""


@contextmanager
def rows_seen(*modules: nn.Module) -> Iterator[list[int]]:
    """Rows of what each call of some modules is given."""
    found: list[int] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[:-1].numel()))
        for m in modules
    ]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_later_calls_equal_the_masked_model(name: str) -> None:
    """Breaks if a shortcut, which the second call takes first, leaves out what is needed."""
    model, inputs = FAMILIES[name].build(), prompts(FAMILIES[name], NUMBERS)
    counts = FAMILIES[name].pixels(NUMBERS)[1]
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    with torch.no_grad():
        first, kept = fast(**inputs).logits, fast.kept()
        for keep in (0.3, 0.6):
            fast.set_budget(keep)
            found = fast(**inputs).logits
            if keep == 0.3:
                assert all(map(torch.equal, fast.kept(), kept))
                assert (found - first).abs().max() <= 1e-5
            stay = staying(inputs, kept_by_image(fast, counts), counts)
            for row, expected in zip(found, masked_logits(model, inputs, stay), strict=True):
                assert (row[-len(expected) :] - expected).abs().max() <= 1e-4


class Linears(TorchFunctionMode):
    """Writes down how many rows each linear layer is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            self.rows.append(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_layers_run_on_what_stays(name: str) -> None:
    """Breaks if those behind the last attention, the projector's included, run on all tokens."""
    model, inputs = FAMILIES[name].build(), prompts(FAMILIES[name], [1, 2])
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    with torch.no_grad():
        fast(**inputs)
        with Linears() as seen:
            fast(**inputs)
    computed = sum(map(len, fast.kept())) - LINE_ENDS.get(name, 0)
    assert {computed, CELL.get(name, 1) * computed} & set(seen.rows)


def test_layers_behind_the_last_needed_one_do_not_run() -> None:
    """Breaks if LLaVA, which reads layer -2, runs its last layer."""
    model, inputs = FAMILIES["llava"].build(), prompts(FAMILIES["llava"], [1])
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    layers = model.model.vision_tower.encoder.layers
    with torch.no_grad():
        fast(**inputs)
        last = model.model.multi_modal_projector.linear_1
        with rows_seen(*(layer.mlp.fc1 for layer in layers), last) as seen:
            fast(**inputs)
    assert seen == [65, 65, len(fast.kept()[0]), len(fast.kept()[0])], "the fourth layer is idle"


def test_what_hooks_are_given_and_what_is_left() -> None:
    """Breaks if the model keeps copies, or a module of it is exchanged."""
    model, inputs = FAMILIES["llava"].build(), prompts(FAMILIES["llava"], [1])
    before = {name: id(module) for name, module in model.named_modules()}
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    with torch.no_grad():
        expected = model(**inputs).logits
        for _ in range(3):
            fast(**inputs)
        assert torch.equal(model(**inputs).logits, expected)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_gradients_of_later_calls() -> None:
    """Breaks if gradients run through rows that were not computed, and become no numbers."""
    model, inputs = FAMILIES["llava"].build(), prompts(FAMILIES["llava"], [1, 1])
    fast = tokenpass.vlm(model, HiPrune(keep=0.3))
    weights = [
        model.model.multi_modal_projector.linear_1.weight,
        model.model.vision_tower.encoder.layers[2].mlp.fc1.weight,
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight,
    ]
    fast(**inputs)
    found = torch.autograd.grad(fast(**inputs).logits.square().sum(), weights)
    stay = staying(inputs, fast.kept(), FAMILIES["llava"].pixels([1, 1])[1])
    logits = torch.cat(masked_logits(model, inputs, stay))
    expected = torch.autograd.grad(logits.square().sum(), weights)
    for gradient, wanted in zip(found, expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-4 * wanted.norm()


class Rows(nn.Module):
    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.table = nn.Parameter(torch.randn(9, 8))
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.norm(self.linear(x)))


ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "gated": lambda x: torch.cat([x[..., :4].sigmoid() * x[..., 4:]] * 2, -1),
    "root mean square": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "regrouped": lambda x: x.reshape(-1, 8).reshape(2, 9, 8),
}

TOGETHER: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda x: x.flip(1),
    "centred": lambda x: x - x.mean(1, keepdim=True),
    "attended": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "summed": lambda x: x.cumsum(1),
    "reordered": lambda x: x.reshape(9, 2, 8).transpose(0, 1),
    "numbered": lambda x: x * torch.arange(9)[:, None],
    "of another image": lambda x: x + x.flip(0),
}


@pytest.mark.parametrize("name", ALONE)
def test_rows_alone(name: str) -> None:
    """Breaks if a usual projector is not understood."""
    assert treats_rows_alone(Rows(ALONE[name]), torch.randn(2, 9, 8))


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_together(name: str) -> None:
    """Breaks if a module is run on some rows whose rows meet, move or are numbered."""
    assert not treats_rows_alone(Rows(TOGETHER[name]), torch.randn(2, 9, 8))


def test_a_table_of_positions() -> None:
    """Breaks if a parameter as long as the rows goes unnoticed."""
    module = Rows(lambda x: x)
    module.then = lambda x: x + module.table
    assert not treats_rows_alone(module, torch.randn(2, 9, 8))
