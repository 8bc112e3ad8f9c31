"""Softmax attention as a running sum over keys: the arithmetic of :mod:`tokenpass.incremental`.

The state of a query is what FlashAttention (arXiv 2205.14135, algorithm 1) carries from one block
of keys to the next: its output so far and the logarithm of its sum of exponentials. With these,
keys can be added to a finished attention, and taken away again:

    lse' = log(exp lse - exp lse_old + exp lse_new)
    out' = (exp lse out - exp lse_old out_old + exp lse_new out_new) / exp lse'

Rounding errors add up, and weigh more if what was taken away had most of the weight. ``drift``
estimates the error of each row of ``out`` in units of float32's epsilon.

Pure functions of tensors, of any number of changed tokens, for a compiler to fuse. Shapes: ``B``
images, ``h`` heads, ``N`` tokens, ``U`` changed ones, ``d`` and ``dv`` the widths of keys and
values, which may have fewer heads than queries. The state is ``out (B, h, N, dv)``, ``lse
(B, h, N)`` and ``drift (B, N)``, float32. A query that sees no key has output 0 and ``lse``
``-inf``. A bias has four dimensions, each 1 or as the scores have it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenpass.attention_rows import (
    additive,
    blocks,
    columns_of_bias,
    each_head,
    finite,
    rows_of_bias,
)

Pair = tuple[Tensor, Tensor]

BLOCK_BYTES = 2**21
"""Size of a block of scores: it stays in the caches of two cores."""

DEVICE_BLOCK_BYTES = 2**28
"""The same on other devices, where it only bounds the memory."""

LSE_LIMIT = 2.0**13
"""Beyond it float32 holds a sum of exponentials to less than a part in a thousand."""

SCORE_UNIT = 16.0
"""Scores are rounded in proportion to their size; beyond it this weighs more than the sums."""

ROUNDING = 0.5
"""Drift of a row in a frame in which next to nothing of its weight changed."""


class Running(NamedTuple):
    """The state: ``out (B, h, N, dv)``, ``lse (B, h, N)``, ``drift (B, N)``."""

    out: Tensor
    lse: Tensor
    drift: Tensor


def exchanged_state(
    query: Tensor,
    old: Pair,
    new: Pair,
    places: Tensor,
    scale: float,
    bias: Tensor | None,
    state: Running,
    *,
    at_once: bool,
) -> Running:
    """The state of all queries without old keys and with new ones.

    A sum that grows beyond float32 in one step makes the drift infinite.

    Args:
        query: ``(B, h, N, d)``. Of those that changed the state is wrong afterwards.
        old: Keys ``(B, hk, U, d)`` and values ``(B, hk, U, dv)`` that the state contains.
        new: Those that take their places.
        places: Where these are, ``(B, U)``, no two equal.
        scale: Factor of the scores.
        bias: Of the scores of all keys.
        state: Before.
        at_once: Whether there is memory for all scores, which a compiler can then fuse.
    """
    heads = query.shape[1]
    old, new = ((each_head(k, heads), each_head(v, heads)) for k, v in (old, new))
    keys, values = torch.cat([old[0], new[0]], 2) * scale, torch.cat([-old[1], new[1]], 2)
    reference = finite(state.lse)
    weighing = weighed if at_once else weigh
    moved, sums = weighing(query, keys, values, places, bias, reference)
    removed, added = sums.unbind(3)
    kept = (state.lse - reference).exp()
    total = kept - removed + added
    inverse = total.clamp_min(0.0).reciprocal()
    inverse = inverse.masked_fill((total == 0) & (kept == 0), 0.0)  # sees no key
    return Running(
        (state.out * kept[..., None] + moved) * inverse[..., None],
        total.log() + reference,
        _drift(reference, kept, removed, added, inverse, state.drift),
    )


def weighed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None,
    reference: Tensor,
) -> Pair:
    """Weighted values of some keys, and the sums of the weights, relative to ``exp(reference)``.

    Args:
        query: ``(B, h, N, d)``.
        keys: ``(B, h, 2 U, d)``, float32, scaled: old ones, and new ones in the same order.
        values: ``(B, h, 2 U, dv)``, float32.
        places: Positions of both, ``(B, U)``.
        bias: Of the scores of all keys.
        reference: ``(B, h, N)``, float32.

    Returns:
        ``(B, h, N, dv)`` and ``(B, h, N, 2)``: sums of the old weights and of the new ones.
    """
    scores = (query.float() @ keys.mT).sub_(reference[..., None])
    both = scores.view(*scores.shape[:3], 2, -1)
    if bias is not None:
        both += additive(columns_of_bias(bias, places))[:, :, :, None]
    return scores.exp_() @ values, both.sum(4)


@torch.library.custom_op("tokenpass::weigh", mutates_args=())
def weigh(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None,
    reference: Tensor,
) -> tuple[Tensor, Tensor]:
    """:func:`weighed` in blocks of queries.

    Scores that stay in the caches take half the time: 6 against 9 ms for 352 keys and 1764 queries,
    18 against 32 ms for 410 and 4096 (6 heads of width 64, two threads, float32).
    """
    (images, heads, tokens, _), count = query.shape, keys.shape[2]
    moved = values.new_empty((images, heads, tokens, values.shape[3]))
    sums = values.new_empty((images, heads, tokens, 2))
    most = BLOCK_BYTES if query.is_cpu else DEVICE_BLOCK_BYTES
    with torch.autocast(query.device.type, enabled=False):
        for part in blocks(tokens, 4 * images * heads * count, most):
            some = None if bias is None else rows_of_bias(bias, part)
            rows, base = query[:, :, part], reference[:, :, part]
            moved[:, :, part], sums[:, :, part] = weighed(rows, keys, values, places, some, base)
    return moved, sums


@weigh.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    return values.new_empty((*rows, values.shape[3])), values.new_empty((*rows, 2))


@register_flop_formula(torch.ops.tokenpass.weigh)
def _weigh_flops(
    query: torch.Size, keys: torch.Size, values: torch.Size, *args: object, **kwargs: object
) -> int:
    images, heads, tokens, width = query
    return 2 * images * heads * tokens * keys[2] * (width + values[3])


def _drift(
    reference: Tensor, kept: Tensor, removed: Tensor, added: Tensor, inverse: Tensor, drift: Tensor
) -> Tensor:
    """Errors of the rows after an exchange, from sums relative to ``exp(reference)``.

    What comes or goes has a relative error of one unit, or of more if scores are large. Errors are
    independent: their squares add up. A row is as bad as its worst head.
    """
    unit = (reference.abs() / SCORE_UNIT).clamp_min(1.0)
    moved = (removed.square() + added.square()) * unit.square()
    errors = ((kept * drift[:, None]).square() + moved) * inverse.square()
    errors = errors.masked_fill(reference.abs() > LSE_LIMIT, torch.inf)
    return (errors.amax(1) + ROUNDING**2).sqrt()
