"""A video whose frames are pruned, and of whose remaining tokens only those that changed are
computed: against pruning alone, the dense model, and a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tokenpass
from tests.test_eventful import walk
from tests.tiny import encoder, images
from tokenpass import Eventful, HiPrune, OptionError
from tokenpass.held import in_places

DEPTH = 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return encoder(depth=DEPTH).eval()


def compiled(dense: nn.Module, method: Any) -> Any:
    torch._dynamo.reset()
    backend = tokenpass.backend(method, inner="eager", always_rewrite=True)
    return torch.compile(dense, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("dropped", ["merge", "discard"])
def test_gates_at_full_budget_change_nothing(dropped: Any) -> None:
    """Breaks if gates compare tokens in the wrong places, or what is restored is out of order."""
    dense, pruning = model(), HiPrune(keep=0.4, dropped=dropped)
    frames = [*walk(images(2), 4)]
    with torch.no_grad():
        both = compiled(dense, [pruning, Eventful(keep=1.0, scene_cut=None)])
        found = [(both(frame), tokenpass.kept(both)) for frame in frames]
        alone = compiled(dense, pruning)
        for frame, (output, kept) in zip(frames, found, strict=True):
            torch.testing.assert_close(output, alone(frame), rtol=0, atol=1e-5)
            assert torch.equal(kept, tokenpass.kept(alone))


@pytest.mark.slow
def test_everything_at_full_budget_is_the_dense_model() -> None:
    dense = model()
    with torch.no_grad():
        both = compiled(dense, [Eventful(keep=1.0, scene_cut=None), HiPrune(keep=1.0)])
        for frame in walk(images(2), 3):
            torch.testing.assert_close(both(frame), dense(frame), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dropped", ["merge", "discard"])
def test_a_static_scene_settles_on_pruning_alone(dropped: Any) -> None:
    """Breaks if a token that changed places is taken for one that did not change."""
    dense, pruning = model(), HiPrune(keep=0.5, dropped=dropped)
    first, second = (images(1) for _ in range(2))
    with torch.no_grad():
        both = compiled(dense, [pruning, Eventful(keep=0.5, scene_cut=None)])
        both(first)
        for _ in range(6 * DEPTH):
            settled = both(second)
        assert all(rate <= 0.75 for rate in tokenpass.stats(both).update_rates)
        alone = compiled(dense, pruning)
        torch.testing.assert_close(settled, alone(second), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_it_costs_less_than_either() -> None:
    dense, image = model(), images(1)
    methods: list[Any] = [HiPrune(keep=0.4), [HiPrune(keep=0.4), Eventful(keep=0.3)]]
    costs = [tokenpass.explain(dense, image, method=method) for method in methods]
    assert costs[1].flops < costs[0].flops < costs[0].flops_before == costs[1].flops_before
    assert costs[1].converted


@pytest.mark.parametrize(
    "method",
    [
        [HiPrune(keep=0.5), HiPrune(keep=0.3)],
        [Eventful(keep=0.5)],
        ["hiprune", "eventful"],
        [HiPrune(keep=0.5, output="pruned"), Eventful(keep=0.5)],
    ],
)
def test_other_combinations_are_refused(method: Any) -> None:
    with pytest.raises(OptionError):
        tokenpass.backend(method)


@given(data=st.data())
def test_tokens_keep_their_places(data: st.DataObject) -> None:
    """Against a plain loop; breaks if a place is given twice, or a token moves without need."""
    tokens = data.draw(st.integers(1, 12))
    count = data.draw(st.integers(1, tokens))
    some = st.permutations(range(tokens)).map(lambda order: order[:count])
    before, positions = (torch.tensor([data.draw(some), data.draw(some)]) for _ in range(2))
    order = in_places(positions, before, tokens)
    for image in range(2):
        found = positions[image, order[image]].tolist()
        assert sorted(found) == sorted(positions[image].tolist())
        new = [p for p in positions[image].tolist() if p not in before[image].tolist()]
        wanted = [p if p in found else new.pop(0) for p in before[image].tolist()]
        assert found == wanted
