"""Leaving tokens out of a sequence, adding them to others, and putting them back.

Pure functions on tensors. Shapes: ``B`` images; ``N`` tokens before a cut, ``K`` after it; ``C``
channels. The functions take positions in a *sequence*: prefix tokens count, and are always kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpass.kernels import most_similar
from tokenpass.views import reshaped


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of ``x`` ``(B, N, ...)`` at ``positions`` ``(B, K)``: ``(B, K, ...)``."""
    images, tokens, *rest = x.shape
    rows = rows_of_all(positions, tokens)
    taken = reshaped(x, [images * tokens, *rest]).index_select(0, rows)
    return reshaped(taken, [*positions.shape, *rest])


def rows_of_all(positions: Tensor, tokens: int) -> Tensor:
    """Positions in each image ``(B, K)`` as rows of all images, ``(B * K,)``."""
    images = positions.shape[0]
    if isinstance(images, int) and images == 1:
        return positions.reshape(-1)
    first = torch.arange(images, device=positions.device)[:, None] * tokens
    return (positions + first).reshape(-1)


def complement(positions: Tensor, tokens: int) -> Tensor:
    """The other positions in ``range(tokens)``: of ``(B, K)`` the ``(B, N - K)``, ascending."""
    images, kept = positions.shape
    is_kept = torch.zeros(images, tokens, dtype=torch.uint8, device=positions.device)
    is_kept = is_kept.scatter(1, positions, 1)
    return is_kept.argsort(dim=1, stable=True)[:, : tokens - kept]


def owners(features: Tensor, kept: Tensor) -> Tensor:
    """For each token the kept token that it goes into: a kept one into itself.

    Args:
        features: What similarity is measured on, ``(B, N, C)``.
        kept: ``(B, K)``, ascending.

    Returns:
        ``(B, N)``, in ``range(K)``.
    """
    images, tokens, _ = features.shape
    count = kept.shape[1]
    own = torch.arange(count, device=kept.device).expand(images, count)
    result = torch.zeros(images, tokens, dtype=torch.int64, device=kept.device)
    result = result.scatter(1, kept, own)
    if isinstance(count, int) and isinstance(tokens, int) and count == tokens:
        return result
    dropped = complement(kept, tokens)
    nearest = most_similar(take(features, dropped), take(features, kept))
    return result.scatter(1, dropped, nearest)


def merged_sizes(sizes: Tensor, owner: Tensor, count: int) -> Tensor:
    """How many tokens each kept one stands for after a cut.

    Args:
        sizes: Before the cut, ``(B, N)``, float32.
        owner: ``(B, N)``, in ``range(count)``.
        count: ``K``.
    """
    zeros = torch.zeros(sizes.shape[0], count, dtype=sizes.dtype, device=sizes.device)
    return zeros.scatter_add(1, owner, sizes)


def merge(x: Tensor, sizes: Tensor, owner: Tensor, total: Tensor) -> Tensor:
    """Size-weighted mean of the tokens that go into each kept one (ToMe, arXiv 2210.09461).

    Args:
        x: ``(B, N, C)``.
        sizes: ``(B, N)``, float32.
        owner: ``(B, N)``, in ``range(K)``.
        total: Sizes after the cut, ``(B, K)``.

    Returns:
        ``(B, K, C)`` in the dtype of ``x``; the sum is taken in float32 or wider.
    """
    images, _, channels = x.shape
    weighted = x.to(torch.promote_types(x.dtype, torch.float32)) * sizes[..., None]
    index = owner[..., None].expand(images, x.shape[1], channels)
    summed = torch.zeros(images, total.shape[1], channels, device=x.device, dtype=weighted.dtype)
    summed = summed.scatter_add(1, index, weighted)
    return (summed / total[..., None]).to(x.dtype)
