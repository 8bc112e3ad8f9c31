"""Which encoder tokens each visual token of a language model is made of.

Found by what flows where, not by shapes or names: gradients that are not a number go in at chosen
visual tokens, and come out at exactly the encoder tokens that these are computed from, since
nothing that touches such a number gives another one. Only what lies behind the last attention is
run backwards. If every encoder token goes into one visual token (a projector, a merger of 2 x 2
patches, a pixel shuffle, pooling), two passes for each binary digit of the count answer it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    probe = _Probe([features], starts, _tokens_reached)
    if not probe(torch.ones(count, dtype=torch.bool)).any():
        raise NotReachedError("the features do not depend on this layer")
    found = _by_digits(probe, count)
    if found is None:
        found = _one_by_one(probe, count)
    tokens, cells = found
    device = features.device
    return Cells(tokens.to(device), cells.to(device), count, layout)


def rows_of(features: Sequence[Tensor], values: Tensor) -> Tensor | None:
    """The visual token that each row of ``values`` goes into.

    Args:
        features: Tensors with a row for each visual token, ``(count, ...)``.
        values: ``(..., C)``; ``features`` are computed from it under autograd.

    Returns:
        ``(rows,)``, int64, -1 for a row that goes into none; ``None`` if a row goes into several.
    """
    found = _by_digits(_Probe(features, [values], _rows_reached), len(features[0]))
    if found is None:
        return None
    cell = torch.full((values.shape[:-1].numel(),), -1)
    rows, cells = found
    cell[rows] = cells
    return cell.to(values.device)


class _Probe:
    """Sends gradients backwards from some visual tokens.

    Args:
        features: Tensors with a row for each visual token, ``(count, ...)``.
        starts: Where gradients come out.
        reached: From a gradient at a start to the positions that it reached, flat and bool.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        starts: Sequence[Tensor],
        reached: Callable[[Tensor], Tensor],
    ) -> None:
        self._features = list(features)
        self._starts = list(starts)
        self._reached = reached

    def __call__(self, chosen: Tensor) -> Tensor:
        """The flat positions that any of the ``chosen`` ``(count,)`` is made of, bool."""
        seeds = [torch.zeros_like(x) for x in self._features]
        for seed in seeds:
            seed[chosen.to(seed.device)] = torch.nan
        gradients = torch.autograd.grad(
            self._features, self._starts, seeds, retain_graph=True, allow_unused=True
        )
        return torch.cat(
            [
                self._reached(torch.zeros_like(start) if gradient is None else gradient).cpu()
                for gradient, start in zip(gradients, self._starts, strict=True)
            ]
        )


def _tokens_reached(gradient: Tensor) -> Tensor:
    """Tokens of ``(B, h, N, d)``."""
    return gradient.isnan().any(-1).any(1).flatten()


def _rows_reached(gradient: Tensor) -> Tensor:
    """Rows of ``(..., C)``."""
    return gradient.isnan().any(-1).flatten()


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
