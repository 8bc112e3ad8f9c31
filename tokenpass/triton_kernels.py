"""The custom operators on a GPU, in Triton: the same numbers as the compositions in
:mod:`tokenpass.kernels`, without a map in memory.

Imported only when tensors of a GPU come. Sums are taken in float32. Nothing is written by two
programs, so results do not depend on their order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64
"""Queries and keys of a tile."""

CHANNELS = 64
"""Channels of a tile of tokens that are compared."""

LEAST = 16
"""Sides of a tile that tensor cores take."""

NO_MASK, ADDED, EXCLUDING = 0, 1, 2


@triton.jit  # type: ignore[untyped-decorator]
def _scores(
    q: Any,
    k: Any,
    bias: Any,
    mask: Any,
    row: Any,
    column: Any,
    queries: Any,
    keys: Any,
    width: Any,
    scale: Any,
    q_row: Any,
    q_channel: Any,
    k_row: Any,
    k_channel: Any,
    bias_key: Any,
    mask_row: Any,
    mask_column: Any,
    has_bias: tl.constexpr,
    kind: tl.constexpr,
    tile_width: tl.constexpr,
) -> Any:
    """A tile of scores; ``-inf`` at keys that are not there."""
    channel = tl.arange(0, tile_width)
    there = channel[None, :] < width
    a = tl.load(
        q + row[:, None] * q_row + channel[None, :] * q_channel,
        mask=(row[:, None] < queries) & there,
        other=0.0,
    )
    b = tl.load(
        k + column[:, None] * k_row + channel[None, :] * k_channel,
        mask=(column[:, None] < keys) & there,
        other=0.0,
    )
    scores = tl.dot(a, tl.trans(b), input_precision="ieee").to(tl.float32) * scale
    if has_bias:
        added = tl.load(bias + column * bias_key, mask=column < keys, other=0.0)
        scores += added.to(tl.float32)[None, :]
    inside = (row[:, None] < queries) & (column[None, :] < keys)
    if kind != 0:
        place = mask + row[:, None] * mask_row + column[None, :] * mask_column
        values = tl.load(place, mask=inside, other=0)
        if kind == 1:
            scores += values.to(tl.float32)
        else:
            scores = tl.where(values != 0, scores, float("-inf"))
    return tl.where(column[None, :] < keys, scores, float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def _row_sums_kernel(
    q: Any,
    k: Any,
    bias: Any,
    mask: Any,
    lse: Any,
    heads: Any,
    queries: Any,
    keys: Any,
    width: Any,
    scale: Any,
    q_image: Any,
    q_head: Any,
    q_row: Any,
    q_channel: Any,
    k_image: Any,
    k_head: Any,
    k_row: Any,
    k_channel: Any,
    bias_image: Any,
    bias_key: Any,
    mask_image: Any,
    mask_head: Any,
    mask_row: Any,
    mask_column: Any,
    has_bias: tl.constexpr,
    kind: tl.constexpr,
    tile_width: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """Logarithm of the sum of exponentials of a tile of queries, over all keys."""
    number = tl.program_id(0).to(tl.int64)
    image, head = number // heads, number % heads
    row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    largest = tl.full((tile_rows,), float("-inf"), tl.float32)
    total = tl.zeros((tile_rows,), tl.float32)
    for start in range(0, keys, tile_columns):
        column = start + tl.arange(0, tile_columns)
        scores = _scores(
            q + image * q_image + head * q_head,
            k + image * k_image + head * k_head,
            bias + image * bias_image,
            mask + image * mask_image + head * mask_head,
            row,
            column,
            queries,
            keys,
            width,
            scale,
            q_row,
            q_channel,
            k_row,
            k_channel,
            bias_key,
            mask_row,
            mask_column,
            has_bias,
            kind,
            tile_width,
        )
        larger = tl.maximum(largest, tl.max(scores, 1))
        # A row of which no key is seen yet has no largest score to measure others from.
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - origin) + tl.sum(tl.exp(scores - origin[:, None]), 1)
        largest = larger
    tl.store(lse + number * queries + row, largest + tl.log(total), mask=row < queries)


@triton.jit  # type: ignore[untyped-decorator]
def _column_sums_kernel(
    q: Any,
    k: Any,
    bias: Any,
    mask: Any,
    lse: Any,
    received: Any,
    heads: Any,
    queries: Any,
    keys: Any,
    width: Any,
    scale: Any,
    q_image: Any,
    q_head: Any,
    q_row: Any,
    q_channel: Any,
    k_image: Any,
    k_head: Any,
    k_row: Any,
    k_channel: Any,
    bias_image: Any,
    bias_key: Any,
    mask_image: Any,
    mask_head: Any,
    mask_row: Any,
    mask_column: Any,
    has_bias: tl.constexpr,
    kind: tl.constexpr,
    tile_width: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """What a tile of keys receives from all queries of a head."""
    number = tl.program_id(0).to(tl.int64)
    image, head = number // heads, number % heads
    column = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    total = tl.zeros((tile_columns,), tl.float32)
    for start in range(0, queries, tile_rows):
        row = start + tl.arange(0, tile_rows)
        scores = _scores(
            q + image * q_image + head * q_head,
            k + image * k_image + head * k_head,
            bias + image * bias_image,
            mask + image * mask_image + head * mask_head,
            row,
            column,
            queries,
            keys,
            width,
            scale,
            q_row,
            q_channel,
            k_row,
            k_channel,
            bias_key,
            mask_row,
            mask_column,
            has_bias,
            kind,
            tile_width,
        )
        sums = tl.load(lse + number * queries + row, mask=row < queries, other=float("inf"))
        total += tl.sum(tl.exp(scores - sums[:, None]), 0)
    tl.store(received + number * keys + column, total, mask=column < keys)


@triton.jit  # type: ignore[untyped-decorator]
def _most_similar_kernel(
    tokens: Any,
    among: Any,
    length: Any,
    found: Any,
    count: Any,
    others: Any,
    channels: Any,
    tokens_image: Any,
    tokens_row: Any,
    tokens_channel: Any,
    among_image: Any,
    among_row: Any,
    among_channel: Any,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    """Positions of the largest products of a tile of tokens with unit vectors; first of equals."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    best = tl.full((tile_rows,), float("-inf"), tl.float32)
    where = tl.zeros((tile_rows,), tl.int64)
    for start in range(0, others, tile_columns):
        column = start + tl.arange(0, tile_columns)
        products = tl.zeros((tile_rows, tile_columns), tl.float32)
        for first in range(0, channels, tile_channels):
            channel = first + tl.arange(0, tile_channels)
            there = channel[None, :] < channels
            a = tl.load(
                tokens
                + image * tokens_image
                + row[:, None] * tokens_row
                + channel[None, :] * tokens_channel,
                mask=(row[:, None] < count) & there,
                other=0.0,
            )
            b = tl.load(
                among
                + image * among_image
                + column[:, None] * among_row
                + channel[None, :] * among_channel,
                mask=(column[:, None] < others) & there,
                other=0.0,
            )
            products += tl.dot(a, tl.trans(b), input_precision="ieee").to(tl.float32)
        lengths = tl.load(length + image * others + column, mask=column < others, other=1.0)
        products = products / lengths[None, :]
        products = tl.where(column[None, :] < others, products, float("-inf"))
        top = tl.max(products, 1)
        candidate = tl.where(products == top[:, None], column[None, :], others)
        first_of_top = tl.min(candidate, 1).to(tl.int64)
        better = top > best
        where = tl.where(better, first_of_top, where)
        best = tl.where(better, top, best)
    tl.store(found + image * count + row, where, mask=row < count)


def attention_received(
    query: Tensor, key: Tensor, scale: float, key_bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """As the operator of this name: column means of the softmax, ``(B, Nk)``, float32.

    Two passes over tiles of the scores: sums of rows, then sums of columns.
    """
    images, heads, queries, width = query.shape
    keys = key.shape[2]
    lse = query.new_empty((images * heads, queries), dtype=torch.float32)
    received = query.new_empty((images * heads, keys), dtype=torch.float32)
    kind, shown = NO_MASK, query
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        wide = mask.expand(images, heads, queries, keys)
        kind = EXCLUDING if mask.dtype == torch.bool else ADDED
        shown = wide.view(torch.uint8) if kind == EXCLUDING else wide
        mask_strides = wide.stride()
    bias = query if key_bias is None else key_bias
    sizes = (heads, queries, keys, width, scale)
    strides = (
        *query.stride(),
        *key.stride(),
        *((0, 0) if key_bias is None else key_bias.stride()),
        *mask_strides,
    )
    fixed: dict[str, Any] = {
        "has_bias": key_bias is not None,
        "kind": kind,
        "tile_width": max(LEAST, triton.next_power_of_2(width)),
        "tile_rows": ROWS,
        "tile_columns": COLUMNS,
    }
    rows = (images * heads, triton.cdiv(queries, ROWS))
    _row_sums_kernel[rows](query, key, bias, shown, lse, *sizes, *strides, **fixed)
    columns = (images * heads, triton.cdiv(keys, COLUMNS))
    _column_sums_kernel[columns](query, key, bias, shown, lse, received, *sizes, *strides, **fixed)
    return received.reshape(images, heads, keys).mean(1).div_(queries)


def most_similar(tokens: Tensor, among: Tensor) -> Tensor:
    """As the operator of this name: positions in ``range(K)``, ``(B, M)``, int64."""
    images, count, channels = tokens.shape
    others = among.shape[1]
    length = among.float().norm(dim=-1).clamp_min_(1e-12)
    found = torch.empty(images, count, dtype=torch.int64, device=tokens.device)
    _most_similar_kernel[images, triton.cdiv(count, ROWS)](
        tokens,
        among,
        length,
        found,
        count,
        others,
        channels,
        *tokens.stride(),
        *among.stride(),
        tile_rows=ROWS,
        tile_columns=COLUMNS,
        tile_channels=CHANNELS,
    )
    return found
