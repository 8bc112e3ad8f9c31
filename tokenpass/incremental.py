"""Softmax attention that is kept up to date, exactly, while some of its tokens change.

When ``U`` of ``N`` tokens change, all queries exchange the old keys and values of these tokens for
the new ones in their running softmax (:mod:`tokenpass.running_softmax`), and the queries that
changed are computed anew: ``O(U N d)`` work instead of ``O(N^2 d)``, ``O(N d)`` memory. Eventful
transformers (arXiv 2308.13494, section 4) update stored ``N x N`` maps instead, with an error that
stays; here the result is attention on the tensors as they are now.

Rounding errors of the exchanges are watched (``drift``) and bounded: each frame computes the rows
with the largest ones anew, and at once all rows beyond a limit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenpass.attention_rows import compute, take
from tokenpass.running_softmax import exchange

REFRESH_FRAMES = 64
"""In so many frames, as many rows as there are get a turn of being computed anew.

Errors of frames are independent, so they grow with the square root of their number: 64 frames have
eight times the error of one. A turn for each row costs 1/64 of dense attention in each frame.
"""

DRIFT_LIMIT = 8.0
"""Rows with more drift are computed anew at once; 64 uneventful frames come to half of it.

Measured on random keys of which a tenth becomes others in each frame: the worst error of a frame,
relative to the largest output, stayed below 2e-6 for scores of standard deviation 1 and below 8e-6
for 4 and 8, where dense float32 attention itself has errors of 1e-6 to 3e-6.
"""

DENSE_SHARE = 0.5
"""Share of rows in need from which on all are computed."""

EXCHANGE_COST = 3.25
"""Work for a changed token, in rows of dense attention: old key, new key, its row, merging."""

OVERHEAD = 240
"""Work that does not depend on the number of changed tokens, in rows of dense attention."""


def refreshed(tokens: int) -> int:
    """Unchanged rows that each frame computes anew."""
    return -(-tokens // REFRESH_FRAMES)


def pays(tokens: int, changed: int) -> bool:
    """Whether exchanging ``changed`` of ``tokens`` keys is faster than dense fused attention.

    Milliseconds by share of changed tokens, on an idle machine (x86 with AVX-512, two threads,
    float32, 6 heads of width 64); the break-even is from finer measurements on one thread:

    | tokens | dense | 2 % | 5 % | 10 % | 20 % | break-even |
    | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
    | 196 | | | | | | never |
    | 400 | | | | | | 15 % |
    | 784 | 7.9 | 3.1 | 3.6 | 5.2 | 8.4 | 19 % |
    | 1764 | 39 | 8.4 | 13 | 20 | 33 | 25 % |
    | 4096 | 217 | 44 | 59 | 90 | 153 | 31 % |
    """
    return EXCHANGE_COST * changed + refreshed(tokens) + OVERHEAD <= tokens


def computed_rows(tokens: int, changed: int) -> int:
    """Work of an update, in rows of dense attention; rows beyond the limit are not foreseen."""
    return 3 * changed + refreshed(tokens) if pays(tokens, changed) else tokens


@torch.library.custom_op("tokenpass::full_attention", mutates_args=("out", "lse", "drift"))
def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    drift: Tensor,
) -> Tensor:
    """Attention of all queries, and the state to update it from.

    Args:
        query: ``(B, h, N, d)``, of any strides, like ``key`` and ``value``.
        key: ``(B, hk, N, d)``; ``hk`` divides ``h``, and successive queries' heads share one.
        value: ``(B, hk, N, dv)``.
        scale: Factor of the scores.
        bias: Broadcasts to ``(B, h, N, N)``: added if floating, ``False`` excludes if bool.
        out: State ``(B, h, N, dv)``, contiguous float32, overwritten.
        lse: State ``(B, h, N)``, likewise.
        drift: State ``(B, N)``, likewise.

    Returns:
        ``(B, h, N, dv)`` in the dtype of the values; the heads of a token lie together. A query
        that sees no key has output 0.
    """
    with torch.autocast(query.device.type, enabled=False):
        compute(query, key, value, scale, _four_dims(bias), None, out, lse)
    drift.zero_()
    return _empty_result(out, value.dtype).copy_(out)


@torch.library.custom_op("tokenpass::update_attention", mutates_args=("out", "lse", "drift"))
def update_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    old_key: Tensor,
    old_value: Tensor,
    changed: Tensor,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    drift: Tensor,
) -> Tensor:
    """Attention after some tokens changed, from the state before.

    All is computed anew where that is faster (:func:`pays`) or where float32 cannot hold what is
    left, say after a key that had all the weight. To see the latter the host waits for the device
    once; while a CUDA graph is captured it cannot, and rows in need get their turns one by one.

    Args:
        query: ``(B, h, N, d)``, changed rows included, like ``key`` and ``value``.
        key: ``(B, hk, N, d)``.
        value: ``(B, hk, N, dv)``.
        old_key: ``(B, hk, U, d)``, what was at the changed positions when the state was written.
        old_value: ``(B, hk, U, dv)``.
        changed: ``(B, U)``, positions of the tokens that changed, in any order. A position may
            occur more than once, with the same old key and value.
        scale: As in :func:`full_attention`, and the same for one state; so is ``bias``.
        bias: See there.
        out: State, updated; as are ``lse`` and ``drift``.

    Returns:
        As :func:`full_attention`.
    """
    if changed.shape[1] > 0:
        with torch.autocast(query.device.type, enabled=False):
            old = old_key, old_value
            _update(query, key, value, old, changed, scale, _four_dims(bias), out, lse, drift)
    return _empty_result(out, value.dtype).copy_(out)


def _update(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    old: tuple[Tensor, Tensor],
    changed: Tensor,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    drift: Tensor,
) -> None:
    rows = None
    if pays(query.shape[2], changed.shape[1]):
        new = take(key, changed), take(value, changed)
        exchange(query, old, new, changed, scale, bias, out, lse, drift)
        # Weights do not show that a value was not finite.
        drift += (old[1] * 0).float().sum((1, 2, 3))[:, None]
        drift.scatter_(1, changed, torch.inf)
        rows = _rows_in_need(drift, changed.shape[1])
    compute(query, key, value, scale, bias, rows, out, lse)
    if rows is None:
        drift.zero_()
    else:
        drift.scatter_(1, rows, 0.0)


def _rows_in_need(drift: Tensor, changed: int) -> Tensor | None:
    """Positions ``(B, R)`` to compute anew, changed ones included; ``None`` if that is all."""
    tokens = drift.shape[1]
    if not (drift.is_cuda and torch.cuda.is_current_stream_capturing()):
        in_need = (drift <= DRIFT_LIMIT).logical_not_().sum(1).max()
        changed = max(changed, int(in_need))
    count = changed + refreshed(tokens)
    return drift.topk(count, dim=1, sorted=False)[1] if count < DENSE_SHARE * tokens else None


def _four_dims(bias: Tensor | None) -> Tensor | None:
    """With dimensions of 1 in front, and where it was expanded."""
    if bias is None:
        return None
    own = (slice(0, None if stride else 1) for stride in bias.stride())
    return bias[(*[None] * (4 - bias.dim()), *own)]


def _empty_result(out: Tensor, dtype: torch.dtype) -> Tensor:
    """For a copy of the output, laid out ``(B, N, h, dv)`` as what follows attention wants it."""
    images, heads, tokens, width = out.shape
    return out.new_empty((images, tokens, heads, width), dtype=dtype).transpose(1, 2)


# ---------------------------------------------------------------- shapes and FLOPs


@full_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    drift: Tensor,
) -> Tensor:
    return _empty_result(out, value.dtype)


@update_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    old_key: Tensor,
    old_value: Tensor,
    changed: Tensor,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    drift: Tensor,
) -> Tensor:
    return _empty_result(out, value.dtype)


@register_flop_formula(torch.ops.tokenpass.full_attention)
def _full_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: object, **kwargs: object
) -> int:
    images, heads, tokens, width = query
    return 2 * images * heads * tokens * tokens * (width + value[3])


@register_flop_formula(torch.ops.tokenpass.update_attention)
def _update_flops(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    old_key: torch.Size,
    *args: object,
    **kwargs: object,
) -> int:
    images, heads, tokens, width = query
    rows = computed_rows(tokens, old_key[2])
    return 2 * images * heads * tokens * rows * (width + value[3])
