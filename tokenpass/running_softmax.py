"""Softmax attention as a running sum over keys: the arithmetic of :mod:`tokenpass.incremental`.

The state of a query is what FlashAttention (arXiv 2205.14135, algorithm 1) carries from one block
of keys to the next: its output so far and the logarithm of its sum of exponentials. With these,
keys can be added to a finished attention, and taken away again:

    lse' = log(exp lse - exp lse_old + exp lse_new)
    out' = (exp lse out - exp lse_old out_old + exp lse_new out_new) / exp lse'

Rounding errors add up, and weigh more if what was taken away had most of the weight. ``drift``
estimates the error of each row of ``out`` in units of float32's epsilon.

Shapes: ``B`` images, ``h`` heads, ``N`` tokens, ``U`` changed ones, ``R`` rows at hand, ``d`` and
``dv`` the widths of keys and values, which may have fewer heads than queries. The state is ``out
(B, h, N, dv)``, ``lse (B, h, N)`` and ``drift (B, N)``, contiguous float32. A query that sees no
key has output 0 and ``lse`` ``-inf``. A bias has four dimensions, each 1 or as the scores have it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenpass.attention_rows import (
    additive,
    attention,
    blocks,
    columns_of_bias,
    each_head,
    finite,
    line_bytes,
    rows_of_bias,
)

Pair = tuple[Tensor, Tensor]

KEY_MULTIPLE = 16
"""Few keys are filled up to whole vector registers: fused, 80 keys take half the time of 78."""

PRODUCT_BYTES = 8 * 2**20
"""Scores up to this size are best exchanged by two matrix products, in between near the caches.

With 1.4 megabytes they take 0.65 of the time of fused kernels, which have two outputs to merge;
with 7 both take the same time, with 14 they take 1.15 of it.
"""

DEVICE_PRODUCT_BYTES = 2**28
"""The same on other devices, whose fused kernels do not take the masks needed here."""

LSE_LIMIT = 2.0**13
"""Beyond it float32 holds a sum of exponentials to less than a part in a thousand."""

ROUNDING = 0.5
"""Drift of a row in a frame in which next to nothing of its weight changed."""


def exchange(
    query: Tensor,
    old: Pair,
    new: Pair,
    changed: Tensor,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    drift: Tensor,
) -> None:
    """Take old keys out of the state of all queries and put new ones in.

    Args:
        query: ``(B, h, N, d)``. Of those that changed the state is wrong afterwards.
        old: Keys ``(B, hk, U, d)`` and values ``(B, hk, U, dv)`` that the state contains.
        new: Those that take their places.
        changed: These places, ``(B, U)``; of equal ones one counts.
        scale: Factor of the scores.
        bias: Of the scores of all keys.
        out: State, updated; as are ``lse`` and ``drift``.
    """
    images, heads, tokens, _ = query.shape
    count = changed.shape[1]
    counts = _one_of_equal(changed, tokens)
    old, new = ((each_head(k, heads), each_head(v, heads)) for k, v in (old, new))
    limit = PRODUCT_BYTES if query.is_cpu else DEVICE_PRODUCT_BYTES
    if 8 * images * heads * tokens * count <= limit:
        columns = None if bias is None else columns_of_bias(bias, changed)
        _exchange_by_products(query, old, new, counts, scale, columns, out, lse, drift)
        return
    fill = -count % KEY_MULTIPLE
    old, new = ((_filled(k, fill), _filled(v, fill)) for k, v in (old, new))
    mask = functional.pad(additive(counts), (0, fill), value=-torch.inf)[:, None, None]
    for rows in blocks(tokens, line_bytes(bias, images, count)):
        biased = mask
        if bias is not None:
            columns = columns_of_bias(rows_of_bias(bias, rows), changed)
            biased = mask + functional.pad(additive(columns), (0, fill))
        some = query[:, :, rows].float().contiguous()
        parts = [attention(some, k, v, biased, scale) for k, v in (old, new)]
        _merge(parts[0], parts[1], out[:, :, rows], lse[:, :, rows], drift[:, rows])


def _merge(old: Pair, new: Pair, out: Tensor, lse: Tensor, drift: Tensor) -> None:
    """Update the state of some rows by the output and ``lse`` of old and of new keys alone."""
    reference = finite(torch.maximum(lse, new[1]))
    kept, removed, added = ((x - reference).exp_() for x in (lse, old[1], new[1]))
    inverse = _settle(reference, kept, removed, added, lse, drift)
    out.mul_((kept * inverse)[..., None])
    out.addcmul_(old[0], (removed * inverse)[..., None], value=-1.0)
    out.addcmul_(new[0], (added * inverse)[..., None])


def _exchange_by_products(
    query: Tensor,
    old: Pair,
    new: Pair,
    counts: Tensor,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    drift: Tensor,
) -> None:
    """The same with all weights at once, relative to the sums before.

    A sum that grows beyond float32 in one step makes the drift infinite.

    Args:
        counts: Which of the changed places count, ``(B, U)``.
        bias: Of the scores of the changed keys.
    """
    images, heads, tokens, _ = query.shape
    count, none = counts.float(), torch.zeros_like(counts, dtype=torch.float32)
    sides = torch.stack([torch.cat([count, none], 1), torch.cat([none, count], 1)], 2)[:, None]
    keys = torch.cat([old[0], new[0]], 2)
    values = torch.cat([-old[1], new[1]], 2).mul_(sides.sum(3, keepdim=True))
    reference = finite(lse)
    # Scaled as fused kernels do it: a key that comes and one that goes lose the same bits.
    weights = out.new_empty(images * heads, tokens, keys.shape[2])
    weights.baddbmm_(_maps(query.float()), _maps(keys).mT, beta=0.0, alpha=scale)
    weights.sub_(_maps(reference)[..., None])
    if bias is not None:
        both = weights.view(images, heads, tokens, 2, -1)
        both += additive(bias)[:, :, :, None]
    weights.exp_()
    masses = torch.bmm(weights, _maps(sides.expand(-1, heads, -1, -1)))
    removed, added = masses.view(images, heads, tokens, 2).unbind(3)
    _maps(out).baddbmm_(weights, _maps(values))
    kept = (lse - reference).exp_()
    out.mul_(_settle(reference, kept, removed, added, lse, drift)[..., None])


def _settle(
    reference: Tensor, kept: Tensor, removed: Tensor, added: Tensor, lse: Tensor, drift: Tensor
) -> Tensor:
    """Update ``lse`` and ``drift`` by sums relative to ``exp(reference)``; return 1 / the new sum.

    What comes or goes has a relative error of one unit. Errors are independent: their squares add
    up. A row is as bad as its worst head.
    """
    total = kept - removed + added
    inverse = total.clamp_min(0.0).reciprocal_()
    inverse.masked_fill_((total == 0) & (kept == 0), 0.0)  # sees no key
    errors = (kept * drift[:, None]).square_() + removed.square() + added.square()
    errors *= inverse.square()
    errors.masked_fill_(reference.abs() > LSE_LIMIT, torch.inf)
    torch.sqrt(errors.amax(1).add_(ROUNDING**2), out=drift)
    lse.copy_(total.log_().add_(reference))
    return inverse


def _one_of_equal(places: Tensor, tokens: int) -> Tensor:
    """Marks one of each set of equal positions, ``(B, U)``."""
    images, count = places.shape
    numbers = torch.arange(count, device=places.device).expand(images, count)
    # Which of equal positions is written last does not matter, only that it is one of them.
    last = places.new_zeros(images, tokens).scatter_(1, places, numbers)
    return last.gather(1, places) == numbers


def _filled(keys: Tensor, fill: int) -> Tensor:
    """With some more, which a mask leaves out."""
    if fill == 0:
        return keys
    return torch.cat([keys, keys[:, :, :1].expand(-1, -1, fill, -1)], 2)


def _maps(x: Tensor) -> Tensor:
    """Images and heads as one dimension."""
    return x.flatten(0, 1)
