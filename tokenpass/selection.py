"""HiPrune's rule (arXiv 2508.00553, section 4.2) on score tensors; knows nothing of models.

Shapes: ``B`` images, ``N`` patch tokens in grid order, ``K`` kept ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenpass import torch_internals as internals
from tokenpass.errors import OptionError
from tokenpass.methods import Budget, HiPrune


def token_budget(keep: Budget, tokens: int) -> int:
    """``K`` for ``tokens`` patch tokens: at least one, at most all."""
    wanted = round(keep * tokens) if isinstance(keep, float) else keep
    return internals.larger(1, internals.smaller(wanted, tokens))


def anchor_count(budget: int, alpha: float) -> int:
    """Number of anchors: a fifth of their share, since each brings up to four neighbours.

    Rounded as the published code does it, halves to even.
    """
    return round(budget * alpha / 5)


def descending(scores: Tensor) -> Tensor:
    """Positions from best to worst, ``(B, N)``; of equal scores the lower position comes first."""
    return scores.argsort(dim=1, descending=True, stable=True)


def anchors(scores: Tensor, count: int) -> Tensor:
    """The ``count`` best tokens of each image as a mask ``(B, N)``, bool."""
    ranks = descending(scores).argsort(dim=1)
    return ranks < count


def with_neighbours(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """``mask`` and the four neighbours of its tokens on the grid, ``(B, N)``, bool.

    Neighbours beyond the border do not exist. In a grid of frames ``(T, H, W)`` they lie in the
    same frame.
    """
    height, width = grid[-2:]
    inside = mask.reshape(-1, height, width)
    around = pad(inside, (1, 1, 1, 1))
    near = (
        inside
        | around[:, :-2, 1:-1]
        | around[:, 2:, 1:-1]
        | around[:, 1:-1, :-2]
        | around[:, 1:-1, 2:]
    )
    return near.reshape(mask.shape)


def best(safe: Tensor, scores: Tensor, count: int) -> Tensor:
    """The ``count`` best tokens of each image, the ``safe`` ones before all others.

    Args:
        safe: ``(B, N)``, bool.
        scores: ``(B, N)``; ranks the safe tokens among themselves and the others.
        count: ``K``.

    Returns:
        Grid positions ``(B, K)``, ascending.
    """
    order = descending(scores)
    safe_first = safe.gather(1, order).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return order.gather(1, safe_first)[:, :count].sort(dim=1).values


def select(
    method: HiPrune, object_scores: Tensor, deep_scores: Tensor, grid: Sequence[int]
) -> Tensor:
    """Apply a method's rule to given scores.

    Anchors are the best by ``object_scores``, buffers their neighbours on the grid, registers the
    best of the rest by ``deep_scores``, up to exactly ``K``. Should anchors and buffers alone
    exceed the budget, the best of them by ``object_scores`` are kept. With ``method.compat`` the
    published code's selection is returned, quirks included: the budget of ``"llava"`` is shared by
    the images of the batch, ``"qwen"`` may keep fewer tokens than its budget.

    Args:
        method: Budget, alpha and compatibility.
        object_scores: Attention received in the object layer, ``(B, N)``.
        deep_scores: Attention received in the deep layer, ``(B, N)``.
        grid: ``(H, W)`` or ``(T, H, W)``.

    Returns:
        Grid positions ``(B, K)``, int64, ascending.

    Raises:
        OptionError: If the shapes do not fit, or where the published code fails.
    """
    if object_scores.dim() != 2 or object_scores.shape != deep_scores.shape:
        raise OptionError(
            f"scores of shapes {tuple(object_scores.shape)} and {tuple(deep_scores.shape)}: "
            "expected two of shape (B, N)"
        )
    if len(grid) not in (2, 3) or any(not isinstance(side, int) or side < 1 for side in grid):
        raise OptionError(f"grid={tuple(grid)}: expected (H, W) or (T, H, W), positive integers")
    tokens, area = object_scores.shape[1], math.prod(grid)
    if method.compat != "qwen" and area != tokens:
        raise OptionError(f"grid={tuple(grid)} has {area} tokens, the scores have {tokens}")
    if method.compat == "llava":
        return _select_llava(method, object_scores, deep_scores, grid)
    if method.compat == "qwen":
        return _select_qwen(method, object_scores, deep_scores, grid)
    budget = token_budget(method.keep, tokens)
    return best(anchors_and_buffers(method, object_scores, grid, budget), deep_scores, budget)


def anchors_and_buffers(
    method: HiPrune, object_scores: Tensor, grid: Sequence[int], budget: int
) -> Tensor:
    """Anchors and their neighbours as a mask ``(B, N)``; at most ``budget`` of them, the best."""
    found = anchors(object_scores, anchor_count(budget, method.alpha))
    if method.compat:
        return published_neighbours(found, grid[-1])
    safe = with_neighbours(found, grid)
    return safe & anchors(object_scores.masked_fill(~safe, -torch.inf), budget)


def published_neighbours(mask: Tensor, width: int) -> Tensor:
    """Neighbours as the published code takes them: ``±1`` and ``±width`` in the flat order.

    A neighbour of a token at the end of a row is the first of the next row, and one beyond the
    image is the first or last token of all.
    """
    tokens = mask.shape[1]
    flat = torch.arange(tokens, device=mask.device)
    near = mask
    for step in (1, -1, width, -width):
        target = (flat + step).clamp(0, tokens - 1).expand_as(mask)
        near = (
            torch.zeros_like(mask, dtype=torch.uint8)
            .scatter_reduce(1, target, mask.to(torch.uint8), "amax")
            .bool()
            | near
        )
    return near


def _select_llava(
    method: HiPrune, object_scores: Tensor, deep_scores: Tensor, grid: Sequence[int]
) -> Tensor:
    images, tokens = object_scores.shape
    shared = method.keep if isinstance(method.keep, int) else int(method.keep * tokens) * images
    rows = [
        _published(object_scores[i], deep_scores[i], int(shared / images), method.alpha, grid[-1])
        for i in range(images)
    ]
    return torch.stack(rows)


def _select_qwen(
    method: HiPrune, object_scores: Tensor, deep_scores: Tensor, grid: Sequence[int]
) -> Tensor:
    images, tokens = object_scores.shape
    budget = method.keep if isinstance(method.keep, int) else round(tokens * method.keep)
    rows = [
        _published(object_scores[i], deep_scores[i], budget, method.alpha, grid[-1])
        for i in range(images)
    ]
    counts = {len(row) for row in rows}
    if len(counts) > 1:
        raise OptionError(
            f'compat="qwen" keeps {sorted(counts)} tokens of the images in this batch: '
            "select for each image alone, or use compat=False"
        )
    return torch.stack(rows)


def _published(
    object_row: Tensor, deep_row: Tensor, budget: int, alpha: float, width: int
) -> Tensor:
    """One image. Anchors and buffers are penalised by one in the deep layer, not excluded."""
    tokens = len(object_row)
    mask = torch.zeros(1, tokens, dtype=torch.bool, device=object_row.device)
    mask[0, torch.topk(object_row, anchor_count(budget, alpha)).indices] = True
    local = published_neighbours(mask, width)[0]
    registers = budget - int(local.sum())
    if not 0 <= registers <= tokens:
        raise OptionError(
            f"{int(local.sum())} anchors and buffers for a budget of {budget} of {tokens} tokens: "
            "the published code fails here; use a smaller alpha, or compat=False"
        )
    penalised = deep_row - local.to(deep_row.dtype)
    local[torch.topk(penalised, registers).indices] = True
    return local.nonzero().squeeze(1)
