"""Which visual tokens are kept, against attention maps that the model itself returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenpass
from tests.vlm.families import FAMILIES, prompts
from tokenpass import HiPrune

LAYERS = (2, 3)
"""Object layer and deep layer, counted from 1; the features here depend on both."""

METHOD = HiPrune(keep=0.4, alpha=0.6, object_layer=LAYERS[0], deep_layer=LAYERS[1])

Cells = Callable[[Tensor], Tensor]


def patches(received: Tensor) -> Tensor:
    """One patch for each visual token; ``(B, 64)``."""
    return received[:, -64:]


def squares(received: Tensor) -> Tensor:
    """2 x 2 patches of a grid of 8 x 8 for each visual token, ``(B, 16)``."""
    grid = received[:, -64:].reshape(-1, 4, 2, 4, 2)
    return grid.mean((2, 4)).flatten(1)


def quads(received: Tensor) -> Tensor:
    """Four patches in a row for each visual token."""
    return received.reshape(len(received), -1, 4).mean(-1)


TOWERS: dict[str, tuple[str, Cells]] = {
    "llava": ("vision_tower", patches),
    "paligemma": ("vision_tower", patches),
    "internvl": ("vision_tower", squares),
    "gemma3": ("vision_tower", squares),
    "idefics3": ("vision_model", squares),
}


def received(maps: Tensor) -> Tensor:
    """Attention that each key receives, from maps ``(B, h, N, N)``."""
    return maps.float().mean((1, 2))


@pytest.mark.parametrize("name", TOWERS)
def test_kept_tokens_are_those_of_the_maps(name: str) -> None:
    """Breaks if scores are those of another layer, of other cells, or of another order."""
    model = FAMILIES[name].build()
    inputs = prompts(FAMILIES[name], [1, 1])
    fast = tokenpass.vlm(model, METHOD)
    with torch.no_grad():
        fast(**inputs)
        kept = torch.stack(fast.kept())
        tower, cells = TOWERS[name]
        encoder = getattr(model.model, tower)
        encoder.set_attn_implementation("eager")
        pixels = inputs["pixel_values"].flatten(0, -4)
        maps = encoder(pixels, output_attentions=True).attentions
    first, deep = (cells(received(maps[number - 1])) for number in LAYERS)
    side = int(first.shape[1] ** 0.5)
    assert torch.equal(kept, tokenpass.select(METHOD, first, deep, (side, side)))


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, alpha=0.1, compat="qwen")])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_packed_images_are_scored_alone(name: str, method: HiPrune) -> None:
    """Breaks if attention or neighbours run from one image of a sequence into the next.

    The published code for Qwen sums over queries where ours takes means.
    """
    model = FAMILIES[name].build()
    inputs = prompts(FAMILIES[name], [2])
    fast = tokenpass.vlm(model, method)
    seen: list[Any] = []
    with torch.no_grad():
        fast(**inputs)
        model.model.visual.set_attn_implementation("eager")
        hooks = [
            block.attn.register_forward_hook(lambda *a: seen.append(a))
            for block in model.model.visual.blocks
        ]
        with maps_of_softmax() as maps:
            model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    for hook in hooks:
        hook.remove()
    assert len(maps) == 2 * len(seen), "each layer attends image by image"
    for image, (_, height, width) in enumerate(inputs["image_grid_thw"].tolist()):
        scale = height * width if method.compat else 1
        first, deep = (scale * quads(received(maps[2 * (n - 1) + image])) for n in LAYERS)
        wanted = tokenpass.select(method, first, deep, (height // 2, width // 2))
        assert torch.equal(fast.kept()[image], wanted[0])


class maps_of_softmax:  # noqa: N801
    """Collects what softmax returns inside."""

    def __enter__(self) -> list[Tensor]:
        self._softmax = torch.nn.functional.softmax
        found: list[Tensor] = []

        def softmax(*args: Any, **kwargs: Any) -> Tensor:
            found.append(self._softmax(*args, **kwargs))
            return found[-1]

        torch.nn.functional.softmax = softmax
        return found

    def __exit__(self, *error: object) -> None:
        torch.nn.functional.softmax = self._softmax


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_eager_attention_gives_the_same(name: str) -> None:
    """Breaks if attention that the model writes out is scored otherwise."""
    model = FAMILIES[name].build()
    inputs = prompts(FAMILIES[name], [1, 1])
    with torch.no_grad():
        fused = tokenpass.vlm(model, METHOD)
        fused(**inputs)
        model.set_attn_implementation("eager")
        written = tokenpass.vlm(model, METHOD)
        written(**inputs)
    for found, expected in zip(written.kept(), fused.kept(), strict=True):
        assert torch.equal(found, expected)


def test_interpolated_tokens() -> None:
    """Breaks if tokens that go into several visual tokens are left out of some."""
    from tokenpass.visual_cells import find_cells

    start = torch.randn(1, 2, 6, 3, requires_grad=True)
    tokens = start.sum(1)[0]
    features = torch.stack((tokens[0] + tokens[1], tokens[1] * tokens[2], tokens[5]))
    cells = find_cells(features, [start])
    pairs = sorted(zip(cells.cells.tolist(), cells.tokens.tolist(), strict=True))
    assert pairs == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 5)]
    scores = torch.tensor([1.0, 3, 5, 7, 9, 11])
    assert cells.mean(scores).tolist() == [2.0, 4.0, 11.0]
