"""Runs an encoder block by block and takes tokens out of it between blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.references.rule import safe_positions, survivors


@dataclass(frozen=True)
class Heads:
    """What an attention is computed from: ``(B, h, L, d)`` each; the bias broadcasts to scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, projections: Sequence[Tensor], heads: int) -> Heads:
        """From projections ``(B, L, h * d)`` of queries, keys and values."""
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in projections)
        return cls(query, key, value)

    def probabilities(self, key_sizes: Tensor) -> Tensor:
        """``(B, h, L, L)``; a key that stands for several tokens weighs as much as they would."""
        scores = self.query @ self.key.transpose(-2, -1) * self.query.shape[-1] ** -0.5
        if self.bias is not None:
            scores = scores + self.bias
        return torch.softmax(scores + key_sizes.log()[:, None, None, :], -1)


class Family(Protocol):
    """What encoders of a library have in common. ``P`` prefix tokens, ``N`` patch tokens."""

    prefix: int
    blocks: Sequence[Any]

    def embed(self, images: Tensor) -> Tensor:
        """The stream that the first block reads, ``(B, P + N, C)``."""

    def attention(self, block: Any, stream: Tensor, positions: Tensor) -> Heads:
        """Of the tokens in ``stream``, whose patch tokens lie at ``positions`` ``(B, K)``."""

    def finish(self, block: Any, stream: Tensor, mixed: Tensor) -> Tensor:
        """The stream after a block, whose attention gave ``mixed``, heads side by side."""

    def outputs(self, stream: Tensor, pooled: Tensor) -> list[Tensor]:
        """The model's outputs: those that hold tokens of ``stream``, others from ``pooled``."""


@dataclass(frozen=True)
class Reduction:
    """What to drop where.

    Attributes:
        cuts: ``{block: patch tokens after it}``, blocks counted from 1; the last is the budget.
        object_layer: The block whose attention finds anchors.
        alpha: Share of the budget for anchors and buffers.
        grid: ``(H, W)``.
        merges: Whether dropped tokens are added to the most similar kept one.
        restores: Whether the outputs hold dropped tokens too.
    """

    cuts: dict[int, int]
    object_layer: int
    alpha: float
    grid: tuple[int, int]
    merges: bool
    restores: bool


class Tokens:
    """The tokens of a running encoder.

    Attributes:
        stream: ``(B, P + K, C)``.
        sizes: How many tokens each stands for, ``(B, P + K)``.
        positions: Of the patch tokens on the grid, ``(B, K)``.
        last: The last value that each patch token had, ``(B, N, C)``.
        owner: Where on the grid each patch token is now, ``(B, N)``.
    """

    def __init__(self, stream: Tensor, prefix: int) -> None:
        images, length, _ = stream.shape
        self.prefix = prefix
        self.stream = stream
        self.sizes = torch.ones(images, length)
        self.positions = torch.arange(length - prefix).repeat(images, 1)
        self.owner = self.positions.clone()
        self.last = stream[:, prefix:].clone()

    def remember(self) -> None:
        for image, positions in enumerate(self.positions):
            self.last[image, positions] = self.stream[image, self.prefix :]

    def restored(self) -> Tensor:
        """Prefix tokens and all patch tokens, dropped ones as what became of them."""
        self.remember()
        patches = [self.last[image, owner] for image, owner in enumerate(self.owner)]
        return torch.cat([self.stream[:, : self.prefix], torch.stack(patches)], 1)

    def keep(self, kept: list[list[int]], *, merges: bool) -> None:
        """Drop all patch tokens but some, given by their places in the stream after the prefix."""
        self.remember()
        rows = [self._kept_rows(image, places, merges) for image, places in enumerate(kept)]
        self.stream, self.sizes, self.positions = (
            torch.stack(parts) for parts in zip(*rows, strict=True)
        )

    def _kept_rows(self, image: int, places: list[int], merges: bool) -> tuple[Tensor, ...]:
        stream, sizes, positions = self.stream[image], self.sizes[image], self.positions[image]
        kept = torch.tensor([*range(self.prefix), *(self.prefix + place for place in places)])
        values, weights = stream[kept] * sizes[kept, None], sizes[kept].clone()
        for place in range(len(positions)) if merges else ():
            if place in places:
                continue
            dropped = self.prefix + place
            alike = cosine_similarity(stream[dropped], stream[kept[self.prefix :]], dim=-1)
            nearest = int(alike.argmax())
            values[self.prefix + nearest] += stream[dropped] * sizes[dropped]
            weights[self.prefix + nearest] += sizes[dropped]
            moved = self.owner[image] == positions[place]
            self.owner[image, moved] = positions[places[nearest]]
        return values / weights[:, None], weights, positions[torch.tensor(places)]


def reduced(family: Family, images: Tensor, plan: Reduction) -> tuple[list[Tensor], Tensor]:
    """The outputs of an encoder that drops tokens, and the grid positions of those it keeps."""
    tokens = Tokens(family.embed(images), family.prefix)
    safe: list[set[int]] = []
    budget = list(plan.cuts.values())[-1]
    for number, block in enumerate(family.blocks, 1):
        received = _run(family, block, tokens)
        if number == plan.object_layer:
            safe = [safe_positions(row, plan.grid, budget, plan.alpha) for row in received]
        if number in plan.cuts:
            kept = _survivors(tokens.positions, safe, received, plan.cuts[number])
            tokens.keep(kept, merges=plan.merges)
    whole = tokens.restored()
    stream = whole if plan.restores else tokens.stream
    return family.outputs(stream, whole if plan.merges else tokens.stream), tokens.positions


def _run(family: Family, block: Any, tokens: Tokens) -> list[list[float]]:
    """Run a block; for each image the attention that its patch tokens receive."""
    heads = family.attention(block, tokens.stream, tokens.positions)
    probabilities = heads.probabilities(tokens.sizes)
    mixed = (probabilities @ heads.value).transpose(1, 2).flatten(2)
    tokens.stream = family.finish(block, tokens.stream, mixed)
    received: list[list[float]] = probabilities.mean((1, 2))[:, family.prefix :].tolist()
    return received


def _survivors(
    positions: Tensor, safe: list[set[int]], received: list[list[float]], count: int
) -> list[list[int]]:
    """For each image the places among its present tokens that stay."""
    found = []
    for row, protected, scores in zip(positions.tolist(), safe, received, strict=True):
        places = {place for place, position in enumerate(row) if position in protected}
        found.append(survivors(places, scores, count))
    return found
