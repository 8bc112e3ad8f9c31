"""Softmax attention of some rows, with what makes a running sum of it: the logarithm of its sums.

Shapes: ``B`` images, ``h`` heads, ``N`` tokens, ``R`` rows at hand, ``d`` and ``dv`` the widths of
keys and values. A query that sees no key has output 0 and logarithm ``-inf``. A bias has four
dimensions, each 1 or as the scores have it; it is added if floating, ``False`` excludes if bool.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenpass.torch_internals import fused_attention

Places = Tensor | slice
"""Positions ``(B, R)``, or the same slice of all images."""

BLOCK_BYTES = 16 * 2**20
"""Size of the largest block of a bias that is gathered or converted."""


def compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write the attention of the queries at ``rows`` ``(B, R)``, or of all, into the state."""
    images, heads, tokens, _ = query.shape
    key, value = (each_head(x, heads) for x in (key, value))
    as_it_is = rows is None and bias is not None and bias.dtype == torch.float32
    line = 0 if as_it_is else line_bytes(bias, images, key.shape[2])
    for part in blocks(tokens if rows is None else rows.shape[1], line, BLOCK_BYTES):
        places = part if rows is None else rows[:, part]
        mask = None if bias is None else additive(rows_of_bias(bias, places))
        some, sums = attention(take(query, places).float(), key, value, mask, scale)
        put_(out, places, some)
        put_(lse[..., None], places, sums[..., None])


# ---------------------------------------------------------------- attention


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention in float32 and the logarithm of its row sums; 0 and ``-inf`` without a key."""
    fused = fused_attention(query, key, value, mask, scale)
    return fused or _composed_attention(query, key, value, mask, scale)


def _composed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What no fused operator takes, in blocks of queries."""
    out = value.new_empty((*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3])
    line = 4 * query.shape[:2].numel() * key.shape[2]
    for rows in blocks(query.shape[2], line, BLOCK_BYTES):
        some = None if mask is None else rows_of_bias(mask, rows)
        found = attention_by_products(query[:, :, rows], key, value, some, scale)
        out[:, :, rows], lse[:, :, rows] = found
    return out, lse


def attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same of a few queries with all their scores in memory: two products of matrices."""
    scores = (query @ key.mT) * scale
    if mask is not None:
        scores = scores + mask
    largest = finite(scores.amax(3))
    weights = (scores - largest[..., None]).exp()
    sums = weights.sum(3)
    inverse = sums.reciprocal().masked_fill(sums == 0, 0.0)  # sees no key
    return (weights @ value) * inverse[..., None], sums.log() + largest


def finite(lse: Tensor) -> Tensor:
    """What exponents are taken relative to: 0 for a query that sees no key."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def each_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values in float32, with a head for each of the queries'."""
    return repeated(x, heads).float()


def repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values with a head for each of the queries'."""
    groups = x.shape[1]
    return x if groups == heads else x.repeat_interleave(heads // groups, 1)


# ---------------------------------------------------------------- rows


def blocks(total: int, line_bytes: int, most: int) -> Iterator[slice]:
    """Slices of ``range(total)`` of ``most`` bytes, or of one line; all at once if it has none."""
    step = max(1, most // line_bytes if line_bytes else total)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def take(x: Tensor, places: Places, dim: int = 2) -> Tensor:
    """The positions ``places`` along a dimension of a tensor of four."""
    if isinstance(places, slice):
        return x.narrow(dim, places.start, places.stop - places.start)
    if places.shape[0] == 1:
        return x.index_select(dim, places[0])
    return x.gather(dim, _spread(places, x, dim))


def put(x: Tensor, places: Tensor, new: Tensor, dim: int = 2) -> Tensor:
    """``x`` with other values in what :func:`take` takes."""
    if places.shape[0] == 1:
        return x.index_copy(dim, places[0], new)
    return x.scatter(dim, _spread(places, x, dim), new)


def put_(x: Tensor, places: Places, new: Tensor, dim: int = 2) -> None:
    """The same in place."""
    if isinstance(places, slice):
        x.narrow(dim, places.start, places.stop - places.start).copy_(new)
    elif places.shape[0] == 1:
        x.index_copy_(dim, places[0], new)
    else:
        x.scatter_(dim, _spread(places, x, dim), new)


def _spread(places: Tensor, x: Tensor, dim: int) -> Tensor:
    """Positions ``(B, R)`` along a dimension of ``x``, for all of its other dimensions."""
    shape = [places.shape[1] if d == dim else size for d, size in enumerate(x.shape)]
    lead = [places.shape[0], *(places.shape[1] if d == dim else 1 for d in range(1, x.dim()))]
    return places.reshape(lead).expand(shape)


# ---------------------------------------------------------------- bias


def line_bytes(bias: Tensor | None, images: int, keys: int) -> int:
    """Bytes of a bias for one query of all images and heads; 0 if all queries share it."""
    if bias is None or bias.shape[2] == 1:
        return 0
    return 4 * images * bias.shape[1] * keys


def rows_of_bias(bias: Tensor, places: Places) -> Tensor:
    if bias.shape[2] == 1:
        return bias
    if isinstance(places, Tensor):
        bias = bias.expand(places.shape[0], -1, -1, -1)
    return take(bias, places)


def columns_of_bias(bias: Tensor, places: Tensor) -> Tensor:
    if bias.shape[3] == 1:
        return bias.expand(-1, -1, -1, places.shape[1])
    return take(bias.expand(places.shape[0], -1, -1, -1), places, 3)


def additive(mask: Tensor) -> Tensor:
    """A mask that is added, from one in which ``False`` excludes, or from one of any precision."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    return mask.float()
