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

from tokenpass import native
from tokenpass.attention_rows import (
    additive,
    attention_by_products,
    compute,
    each_head,
    put,
    rows_of_bias,
    take,
)
from tokenpass.exchange_cost import exchange_count, most_exchanged, pairs, pays, refreshed
from tokenpass.gates import Count
from tokenpass.running_softmax import (
    LSE_LIMIT,
    ROUNDING,
    SCORE_UNIT,
    Pair,
    Running,
    exchanged_state,
)
from tokenpass.torch_internals import fused_attention

DRIFT_LIMIT = 8.0
"""Rows with more drift are computed anew at once; 64 uneventful frames come to half of it.

Measured on random keys of which a tenth becomes others in each frame: the worst error of a frame,
relative to the largest output, stayed below 2e-6 for scores of standard deviation 1 and below 8e-6
for 4 and 8, where dense float32 attention itself has errors of 1e-6 to 3e-6.
"""

DENSE_SHARE = 0.5
"""Share of rows in need from which on all are computed."""

SCORE_BYTES = 2**23
"""Scores that a compiled graph holds at once; of more, blocks are faster.

Fused, an update of 10 % of 784 tokens takes 5.0 ms, in blocks 6.1; of 1764 tokens it is the same.
"""

DEVICE_SCORE_BYTES = 2**28
"""The same on other devices."""


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
) -> None:
    """Attention of all queries, and the state to update it from.

    Args:
        query: ``(B, h, N, d)``, of any strides, like ``key`` and ``value``.
        key: ``(B, hk, N, d)``; ``hk`` divides ``h``, and successive queries' heads share one.
        value: ``(B, hk, N, dv)``.
        scale: Factor of the scores.
        bias: Broadcasts to ``(B, h, N, N)``: added if floating, ``False`` excludes if bool.
        out: State ``(B, h, N, dv)``, float32, of any strides: overwritten by the attention, which
            is 0 for a query that sees no key.
        lse: State ``(B, h, N)``, likewise.
        drift: State ``(B, N)``, likewise.
    """
    wide = _four_dims(bias)
    with torch.autocast(query.device.type, enabled=False):
        if native.available(query, key, value, bias):
            native.attend(query, key, value, scale, wide, None, out, lse)
        else:
            compute(query, key, value, scale, wide, None, out, lse)
    drift.zero_()


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
    exchanged: Count | None = None,
) -> None:
    """Bring the state up to date after some tokens changed: ``out`` is the attention.

    All is computed anew where that is faster (:func:`~tokenpass.exchange_cost.pays`) or where
    float32 cannot hold what is left, say after a key that had all the weight.

    Args:
        query: ``(B, h, N, d)``, changed rows included, like ``key`` and ``value``.
        key: ``(B, hk, N, d)``.
        value: ``(B, hk, N, dv)``.
        old_key: ``(B, hk, U, d)``, what was at the changed positions when the state was written.
        old_value: ``(B, hk, U, dv)``.
        changed: ``(B, U)``, positions of the tokens that changed, no two equal.
        scale: As in :func:`full_attention`, and the same for one state; so is ``bias``.
        bias: See there.
        out: State, updated; as are ``lse`` and ``drift``.
        exchanged: From :func:`~tokenpass.exchange_cost.exchange_count` for ``U``, which is the
            default; compiled code asks for itself.
    """
    if native.available(query, key, value, bias):
        old = old_key, old_value
        update_by_code(query, key, value, *old, changed, scale, bias, out, lse, drift)
        return
    tokens = query.shape[2]
    if exchanged is None:
        exchanged = exchange_count(tokens, changed.shape[1])
    places = changed.narrow(1, 0, exchanged)
    old = old_key.narrow(2, 0, exchanged), old_value.narrow(2, 0, exchanged)
    new = take(key, places), take(value, places)
    wide, state, at_once = _four_dims(bias), Running(out, lse, drift), _scores_fit(query)
    with torch.autocast(query.device.type, enabled=False):
        after = exchanged_state(query, old, new, places, scale, wide, state, at_once=at_once)
        # Weights do not show that a value was not finite.
        spoiled = (old[1] * 0).float().sum((1, 2, 3))[:, None]
        worst = (after.drift + spoiled).scatter(1, changed, torch.inf)
        count = torch.sym_min(exchanged + refreshed(tokens), tokens)  # type: ignore[no-untyped-call]
        rows = worst.topk(count, dim=1).indices
        anew = _rows_anew(query, key, value, rows, scale, wide, at_once=at_once)
    out.copy_(put(after.out, rows, anew[0]))
    lse.copy_(put(after.lse[..., None], rows, anew[1][..., None]).squeeze(3))
    drift.copy_(worst.scatter(1, rows, 0.0))
    in_need = (drift <= DRIFT_LIMIT).logical_not().sum(1).max()
    left = changed.shape[1] - exchanged
    recompute_attention(query, key, value, scale, bias, in_need, left, out, lse, drift)


@torch.library.custom_op("tokenpass::update_by_code", mutates_args=("out", "lse", "drift"))
def update_by_code(
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
) -> None:
    """:func:`update_attention` by :mod:`tokenpass.native`, and with its arguments."""
    tokens, mask, new = query.shape[2], _four_dims(bias), (key, value)
    if not pays(tokens, changed.shape[1], compiled=True):
        native.attend(query, *new, scale, mask, None, out, lse)
        drift.zero_()
        return
    limits = native.Limits(
        SCORE_UNIT, LSE_LIMIT, ROUNDING, DRIFT_LIMIT, DENSE_SHARE, refreshed(tokens)
    )
    old = old_key, old_value
    native.update(query, old, new, changed, scale, mask, out, lse, drift, limits)


def _scores_fit(query: Tensor) -> bool:
    """Whether to keep all scores that may be exchanged in memory."""
    images, heads, tokens, _ = query.shape
    limit = SCORE_BYTES if query.is_cpu else DEVICE_SCORE_BYTES
    return 8 * images * heads * tokens * most_exchanged(tokens) <= limit


def _rows_anew(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    scale: float,
    bias: Tensor | None,
    *,
    at_once: bool,
) -> Pair:
    """Attention of the queries at ``rows`` ``(B, R)``, and the logarithm of its sums."""
    heads, some = query.shape[1], take(query, rows).float()
    inputs = some, each_head(key, heads), each_head(value, heads)
    mask = None if bias is None else additive(rows_of_bias(bias, rows))
    fused = None if at_once else fused_attention(*inputs, mask, scale)
    return fused or attention_by_products(*inputs, mask, scale)


@torch.library.custom_op("tokenpass::recompute_attention", mutates_args=("out", "lse", "drift"))
def recompute_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    in_need: Tensor,
    left: int,
    out: Tensor,
    lse: Tensor,
    drift: Tensor,
) -> None:
    """Compute rows anew that have too much drift, or all if changed tokens were ``left`` out.

    The host waits for the device to see how many they are; while a CUDA graph is captured it
    cannot, and rows in need get their turns one by one.

    Args:
        query: As in :func:`update_attention`, like the others.
        in_need: Most rows of an image beyond :data:`DRIFT_LIMIT`, ``()``.
        left: How many changed tokens were not exchanged.
    """
    rows = None
    if left == 0:
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        count = int(in_need)
        if count == 0:
            return
        if count < DENSE_SHARE * query.shape[2]:
            rows = drift.topk(count, dim=1, sorted=False).indices
    with torch.autocast(query.device.type, enabled=False):
        compute(query, key, value, scale, _four_dims(bias), rows, out, lse)
    if rows is None:
        drift.zero_()
    else:
        drift.scatter_(1, rows, 0.0)


def _four_dims(bias: Tensor | None) -> Tensor | None:
    """With dimensions of 1 in front, and where it was expanded."""
    if bias is None:
        return None
    own = (slice(0, None if stride else 1) for stride in bias.stride())
    return bias[(*[None] * (4 - bias.dim()), *own)]


# ---------------------------------------------------------------- shapes and FLOPs


@full_attention.register_fake
def _(*args: object) -> None:
    pass


@recompute_attention.register_fake
def _(*args: object) -> None:
    pass


@update_by_code.register_fake
def _(*args: object) -> None:
    pass


@register_flop_formula(torch.ops.tokenpass.full_attention)
def _full_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: object, **kwargs: object
) -> int:
    images, heads, tokens, width = query
    return 2 * images * heads * tokens * tokens * (width + value[3])


@register_flop_formula(torch.ops.tokenpass.recompute_attention)
def _recompute_flops(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    scale: float,
    bias: torch.Size | None,
    in_need: torch.Size,
    left: int,
    *args: object,
    **kwargs: object,
) -> int:
    """Rows beyond the limit of drift are not foreseen."""
    return _full_flops(query, key, value) if left else 0


@register_flop_formula(torch.ops.tokenpass.update_by_code)
def _update_flops(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    old_key: torch.Size,
    *args: object,
    **kwargs: object,
) -> int:
    images, heads, tokens, width = query
    compared = pairs(tokens, old_key[2], compiled=True)
    return 2 * images * heads * compared * (width + value[3])
