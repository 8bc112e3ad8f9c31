"""Each selector against a plain reading of its rule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

import tokenpass
from tests.vlm.families import FAMILIES, prompts
from tokenpass import HiPrune, OptionError, selectors
from tokenpass.visual_grid import Raster
from tokenpass.visual_tokens import VisualTokens


def tokens(count: int = 12, seed: int = 0, **more: Any) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 6, generator=generator)
    scores = torch.rand(3, count, generator=generator)
    given = {"class_scores": scores[2], "keys": torch.randn(count, 4, generator=generator)}
    return VisualTokens(values, scores[0], scores[1], **{**given, **more})


@pytest.mark.parametrize("name", selectors.__all__)
@pytest.mark.parametrize("budget", [1, 5, 12])
def test_every_selector_keeps_its_budget(name: str, budget: int) -> None:
    """Breaks if a selector keeps too few, one twice, or out of order."""
    found = getattr(selectors, name)(tokens(), budget)
    kept = found[0] if isinstance(found, tuple) else found
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == budget
    assert 0 <= int(kept.min()) <= int(kept.max()) < 12


@pytest.mark.parametrize("name", selectors.__all__)
def test_every_selector_runs_in_a_model(name: str) -> None:
    """Breaks if a selector needs what a model does not give it."""
    fast = tokenpass.vlm(
        FAMILIES["llava"].build(), HiPrune(keep=10), selector=getattr(selectors, name)
    )
    with torch.no_grad():
        logits = fast(**prompts(FAMILIES["llava"], [2])).logits
    assert [len(kept) for kept in fast.kept()] == [10, 10]
    assert logits.isfinite().all()


def test_random_tokens_follow_the_seed() -> None:
    """Breaks if a choice cannot be repeated, or some tokens are never chosen."""
    torch.manual_seed(0)
    first = selectors.random_tokens(tokens(), 4)
    seen = {int(k) for _ in range(100) for k in selectors.random_tokens(tokens(), 4)}
    torch.manual_seed(0)
    assert torch.equal(selectors.random_tokens(tokens(), 4), first)
    assert seen == set(range(12))


def test_uniform_grid_is_spread() -> None:
    """Breaks if rows or columns are mixed up, or a frame is left out."""
    square = Raster((1, 5, 5), torch.arange(25))
    kept = selectors.uniform_grid(tokens(25, raster=square), 5)
    assert kept.tolist() == [0, 4, 12, 20, 24], "the middle and the four corners"
    frames = Raster((2, 2, 2), torch.arange(8))
    assert [int(k) // 4 for k in selectors.uniform_grid(tokens(8, raster=frames), 2)] == [0, 1]


def test_class_attention_takes_the_best() -> None:
    """Breaks if another score ranks, or a missing class token is overlooked."""
    given = tokens()
    assert given.class_scores is not None
    kept = set(selectors.class_attention(given, 4).tolist())
    lowest = min(float(given.class_scores[k]) for k in kept)
    assert all(float(x) <= lowest for n, x in enumerate(given.class_scores) if n not in kept)
    with pytest.raises(OptionError, match="no class token"):
        selectors.class_attention(tokens(class_scores=None), 4)


def test_visionzip_merges_what_is_not_dominant() -> None:
    """Breaks if a token is lost, or a group is not the mean of its tokens."""
    given = tokens(40)
    assert given.class_scores is not None
    assert given.keys is not None
    budget = 13
    dominant = round(budget * 54 / 64)
    kept, features = selectors.visionzip(given, budget)
    best = set(given.class_scores.argsort(descending=True)[:dominant].tolist())
    assert best < set(kept.tolist())
    groups: dict[int, list[int]] = {k: [k] for k in kept.tolist() if k not in best}
    unit = normalize(given.keys, dim=1)
    for token in set(range(40)) - set(kept.tolist()):
        groups[max(groups, key=lambda k: float(unit[k] @ unit[token]))].append(token)
    for position, feature in zip(kept.tolist(), features, strict=True):
        wanted = given.features[groups.get(position, [position])].mean(0)
        assert (feature - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_divprune_takes_the_farthest(seed: int) -> None:
    """Breaks if a token is next that has a chosen one nearer than another token has."""
    given, budget = tokens(10, seed), 4
    unit = normalize(given.features, dim=1)
    apart: list[list[float]] = (1 - unit @ unit.T).tolist()

    def nearest(token: int, among: Iterable[int]) -> float:
        return min(apart[token][other] for other in among if other != token)

    chosen = [max(range(10), key=lambda k: nearest(k, range(10)))]
    while len(chosen) < budget:
        chosen.append(max(set(range(10)) - set(chosen), key=lambda k: nearest(k, chosen)))
    assert selectors.divprune(given, budget).tolist() == sorted(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_determinantal_is_the_greedy_volume(seed: int) -> None:
    """Breaks if factors are updated wrongly: every step must take the largest determinant."""
    given, budget = tokens(10, seed), 4
    unit = normalize(given.features.double(), dim=1)
    weight = given.deep_scores.double()
    kernel = weight[:, None] * (unit @ unit.T) * weight[None]
    chosen: list[int] = []
    for _ in range(budget):
        chosen.append(
            max(
                set(range(10)) - set(chosen),
                key=lambda k: math.log(
                    max(1e-300, float(torch.linalg.det(kernel[[*chosen, k]][:, [*chosen, k]])))
                ),
            )
        )
    assert selectors.determinantal(given, budget).tolist() == sorted(chosen)
