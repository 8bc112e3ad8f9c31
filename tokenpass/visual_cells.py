"""Which encoder tokens each visual token of a language model is made of.

Found by what flows where, not by shapes or names: gradients that are not a number go in at chosen
visual tokens, and come out at exactly the encoder tokens that these are computed from, since
nothing that touches such a number gives another one. Only what lies behind the last attention is
run backwards. If every encoder token goes into one visual token (a projector, a merger of 2 x 2
patches, a pixel shuffle, pooling), two passes for each binary digit of the count answer it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpass.errors import TokenpassError


@dataclass(frozen=True)
class Cells:
    """The relation between flat encoder tokens and visual tokens.

    Attributes:
        tokens: Flat encoder tokens, ``(pairs,)``, int64.
        cells: The visual token that each goes into, ``(pairs,)``, over all images; a token that
            goes into several is listed with each.
        count: Visual tokens of all images.
        layout: ``(B, N)`` of each call of the layer that the encoder tokens are taken from.
    """

    tokens: Tensor
    cells: Tensor
    count: int
    layout: tuple[tuple[int, int], ...]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the tokens of each cell; 0 for one that is made of none.

        Args:
            values: ``(tokens, ...)``.

        Returns:
            ``(count, ...)``.
        """
        shape = (self.count, *values.shape[1:])
        total = values.new_zeros(shape).index_add_(0, self.cells, values[self.tokens])
        size = self.sizes.clamp(min=1).to(values.dtype)
        return total / size.reshape(-1, *[1] * (values.dim() - 1))

    @property
    def sizes(self) -> Tensor:
        """Encoder tokens of each cell, ``(count,)``, int64."""
        return torch.bincount(self.cells, minlength=self.count)


class NotReachedError(TokenpassError):
    """The features do not depend on the layer that was probed."""


def find_cells(features: Tensor, starts: Sequence[Tensor]) -> Cells:
    """The cells of the visual tokens in ``features``.

    Args:
        features: All visual tokens, ``(count, D)``, computed from ``starts`` under autograd.
        starts: What each call of the last attention returned, ``(B, h, N, d)`` or ``(B, h, N, N)``.

    Raises:
        NotReachedError: If the features do not depend on ``starts``.
        TokenpassError: If all visual tokens are made of all encoder tokens.
    """
    if not features.requires_grad:
        raise NotReachedError("the features do not depend on this layer")
    count = len(features)
    layout = tuple((start.shape[0], start.shape[2]) for start in starts)
    probe = _Probe(features, starts)
    if not probe(torch.ones(count, dtype=torch.bool)).any():
        raise NotReachedError("the features do not depend on this layer")
    found = _by_digits(probe, count)
    if found is None:
        found = _one_by_one(probe, count)
    tokens, cells = found
    device = features.device
    return Cells(tokens.to(device), cells.to(device), count, layout)


class _Probe:
    """Sends gradients backwards from some visual tokens."""

    def __init__(self, features: Tensor, starts: Sequence[Tensor]) -> None:
        self._features = features
        self._starts = list(starts)

    def __call__(self, chosen: Tensor) -> Tensor:
        """The flat encoder tokens that any of the ``chosen`` ``(count,)`` is made of, bool."""
        seed = torch.zeros_like(self._features)
        seed[chosen.to(seed.device)] = torch.nan
        gradients = torch.autograd.grad(
            self._features, self._starts, seed, retain_graph=True, allow_unused=True
        )
        reached = [
            torch.zeros(start.shape[0] * start.shape[2], dtype=torch.bool)
            if gradient is None
            else gradient.isnan().any(-1).any(1).flatten().cpu()
            for gradient, start in zip(gradients, self._starts, strict=True)
        ]
        return torch.cat(reached)


def _by_digits(probe: _Probe, count: int) -> tuple[Tensor, Tensor] | None:
    """Tokens and their cells where no token goes into two cells, else ``None``."""
    numbers = torch.arange(count)
    reached = probe(torch.ones(count, dtype=torch.bool))
    cell = torch.zeros(len(reached), dtype=torch.int64)
    for digit in range(max(1, math.ceil(math.log2(count)))):
        set_ = (numbers >> digit) % 2 == 1
        ones, zeros = probe(set_), probe(~set_)
        if (ones & zeros).any():
            return None
        cell += ones.to(torch.int64) << digit
    tokens = reached.nonzero().squeeze(1)
    return tokens, cell[tokens]


def _one_by_one(probe: _Probe, count: int) -> tuple[Tensor, Tensor]:
    """Tokens and cells where a token goes into several cells, as by interpolation."""
    everything = probe(torch.ones(count, dtype=torch.bool))
    first = probe(torch.arange(count) == 0)
    if count > 1 and bool((first == everything).all()):
        raise TokenpassError(
            "every visual token is made of all encoder tokens (a resampler or another mixing "
            "layer behind the attention): there is no attention that ranks visual tokens"
        )
    tokens, cells = [], []
    for number in range(count):
        mine = probe(torch.arange(count) == number).nonzero().squeeze(1)
        tokens.append(mine)
        cells.append(torch.full_like(mine, number))
    return torch.cat(tokens), torch.cat(cells)
