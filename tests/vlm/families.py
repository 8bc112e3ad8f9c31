"""Tiny models of the real classes with random weights, and prompts for them. No hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.vlm import models
from tests.vlm.models import IMAGE, PAD, PATCH, SIDE, TEXT

Pixels = Callable[[Sequence[int]], tuple[dict[str, Any], list[int]]]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        build: A model with random weights, in eval mode.
        pixels: For prompts of some numbers of images, the encoder's inputs and the visual tokens of
            each image.
        typed: Name of the argument that gives tokens types, if the model takes one: 1 for visual
            tokens.
        answered: The type 1 is that of an answer, before which tokens attend to one another.
        cell: Patches in a row of those that make up a visual token.
    """

    build: Callable[[], Any]
    pixels: Pixels
    typed: str | None = None
    answered: bool = False
    cell: int = 1


def images(count: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *shape, generator=generator)


def prompts(family: Family, numbers: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Prompts with ``numbers`` images each, padded on the left, as one batch."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(2, TEXT, (count,), generator=generator).tolist()

    encoded, counts = family.pixels(numbers) if any(numbers) else ({}, [])
    left = iter(counts)
    rows = []
    for number in numbers:
        row = words(3)
        for _ in range(number):
            row += [IMAGE] * next(left) + words(2)
        rows.append(row + words(3))
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    made = {"input_ids": ids, "attention_mask": mask, **encoded}
    if family.typed:
        answer = torch.arange(length) >= length - 3
        types = answer.expand(ids.shape) if family.answered else ids == IMAGE
        made[family.typed] = types.long()
    return made


def _square(cell: int = 1) -> Pixels:
    tokens = (SIDE // PATCH // cell) ** 2

    def pixels(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        count = sum(numbers)
        return {"pixel_values": images(count, 3, SIDE, SIDE)}, [tokens] * count

    return pixels


ANY_SIZES = [(32, 48), (32, 64)]
"""Height and width of any-resolution images; both go into two crops, the first with padding."""


def _any_resolution(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    count = sum(numbers)
    side = SIDE // PATCH
    sizes = [ANY_SIZES[number % 2] for number in range(count)]
    tokens = [side * side + _unpadded(*size, side, 2 * side) for size in sizes]
    pixels = images(count, 3, 3, SIDE, SIDE)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, tokens


def _unpadded(height: int, width: int, rows: int, columns: int) -> int:
    """Tokens of a crop grid without padding, one line end for each row."""
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
    return rows * (columns + 1)


def _packed(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    """Images of two grids, their patches in one sequence."""
    count = sum(numbers)
    grids = [[(1, 6, 8), (1, 4, 6)][number % 2] for number in range(count)]
    patches = sum(h * w for _, h, w in grids)
    pixels = images(patches, 3 * 2 * PATCH * PATCH)
    tokens = [h * w // 4 for _, h, w in grids]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, tokens


def _sized(cell: int) -> Pixels:
    """Images of two sizes in one tensor with padding."""

    def pixels(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        count = sum(numbers)
        sizes = [[(SIDE, SIDE), (SIDE // 2, SIDE)][number % 2] for number in range(count)]
        tokens = [h * w // (PATCH * cell) ** 2 for h, w in sizes]
        return {
            "pixel_values": images(count, 3, SIDE, SIDE),
            "image_sizes": torch.tensor(sizes),
        }, tokens

    return pixels


def _nested(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    """Images by prompt; an image of zeros stands for none."""
    pixels = torch.zeros(len(numbers), max(numbers), 3, SIDE, SIDE)
    for row, number in enumerate(numbers):
        pixels[row, :number] = images(number + row, 3, SIDE, SIDE)[:number]
    return {"pixel_values": pixels}, [16] * sum(numbers)


FAMILIES: dict[str, Family] = {
    "llava": Family(models.llava, _square()),
    "llava_next": Family(models.llava_next, _any_resolution),
    "llava_onevision": Family(models.llava_onevision, _any_resolution),
    "qwen2_vl": Family(models.qwen2_vl, _packed, "mm_token_type_ids", cell=2),
    "qwen2_5_vl": Family(models.qwen2_5_vl, _packed, "mm_token_type_ids", cell=2),
    "qwen3_vl": Family(models.qwen3_vl, _packed, "mm_token_type_ids", cell=2),
    "internvl": Family(models.internvl, _square(2), cell=2),
    "idefics3": Family(models.idefics3, _nested, cell=2),
    "smolvlm": Family(models.smolvlm, _nested, cell=2),
    "paligemma": Family(models.paligemma, _square(), "token_type_ids", answered=True),
    "gemma3": Family(models.gemma3, _square(2), "token_type_ids", cell=2),
    "mistral3": Family(models.mistral3, _sized(2), cell=2),
    "pixtral": Family(models.pixtral, _sized(1)),
}
