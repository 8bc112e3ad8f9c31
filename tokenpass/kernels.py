"""Custom operators for what must not materialise an ``N x N`` map.

Each has a reference composition of ATen operations that works in blocks, a kernel in Triton for
GPUs (:mod:`tokenpass.triton_kernels`), a fake implementation and a FLOPs formula. Their inputs are
detached by the callers: scores and matches choose tokens, and choosing has no gradient.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

BLOCK_BYTES = 2 * 2**20
"""Size of a temporary: fits the second-level caches that were tried, far below memory."""

BLOCK_ROWS = 512
"""Fewer rows of a map are no block: products of few rows are slow, which costs more than caches."""


TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _on_gpu(x: Tensor) -> ModuleType | None:
    """The kernels for the device that ``x`` is on; ``None`` where there are none.

    Only a GPU's tensors import Triton.
    """
    if x.device.type != "cuda" or x.dtype not in TRITON_DTYPES:
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("tokenpass.triton_kernels")


def _blocks(total: int, each_bytes: int, least: int = 1) -> Iterator[slice]:
    """Slices of ``range(total)`` of which each needs at most :data:`BLOCK_BYTES`, or is ``least``
    long."""
    step = max(least, BLOCK_BYTES // max(1, each_bytes))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def composed_attention_received(
    query: Tensor, key: Tensor, scale: float, key_bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """:func:`attention_received` in ATen operations, on any device."""
    images, heads, queries, width = query.shape
    keys = key.shape[2]
    # Where the maps of one image are small, those of all images are computed together, which needs
    # queries and keys as one batch and mostly a copy of them.
    few = 4 * heads * queries * keys < BLOCK_BYTES // 4
    groups, members = (1, images * heads) if few else (images, heads)
    q = query.reshape(groups, members, queries, width)
    k = key.reshape(groups, members, keys, width).transpose(2, 3)
    bias = None
    if key_bias is not None:
        bias = key_bias.to(q.dtype)[:, None, None, :].expand(images, heads, 1, keys)
        bias = bias.reshape(groups, members, 1, keys)
    full_mask = None if mask is None else mask.expand(images, heads, queries, keys)
    received = torch.zeros(groups, members, 1, keys, dtype=torch.float32, device=q.device)
    block = q.new_empty(0)
    for group, maps in itertools.product(range(groups), _blocks(members, 4 * queries * keys)):
        for rows in _blocks(queries, 4 * keys * (maps.stop - maps.start), BLOCK_ROWS):
            shape = (maps.stop - maps.start, rows.stop - rows.start, keys)
            if block.shape != shape:
                block = q.new_empty(shape)
                ones = torch.ones(shape[0], 1, shape[1], dtype=torch.float32, device=q.device)
            added, beta = (block, 0) if bias is None else (bias[group, maps], 1)
            factors = q[group, maps, rows], k[group, maps]
            torch.baddbmm(added, *factors, beta=beta, alpha=scale, out=block)
            if full_mask is not None:
                _apply(full_mask, block, group * members + maps.start, rows)
            received[group, maps].baddbmm_(ones, _softmax(block))
    return received.reshape(images, heads, keys).mean(1).div_(queries)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in float32; in the memory of ``scores`` where it is that of a CPU,
    whose kernel has read a row before it writes the row."""
    if scores.dtype == torch.float32 and scores.device.type == "cpu":
        return torch.softmax(scores, -1, out=scores)
    return scores.softmax(-1, dtype=torch.float32)


def _apply(mask: Tensor, scores: Tensor, first: int, rows: slice) -> None:
    """Apply a mask ``(B, h, Nq, Nk)`` to some rows of the maps from ``first`` on, in place."""
    for place in range(len(scores)):
        image, head = divmod(first + place, mask.shape[1])
        part = mask[image, head, rows]
        if mask.dtype == torch.bool:
            scores[place].masked_fill_(~part, -torch.inf)
        else:
            scores[place].add_(part)


@torch.library.custom_op("tokenpass::attention_received", mutates_args=())
def attention_received(
    query: Tensor, key: Tensor, scale: float, key_bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The attention each key receives: column means of ``softmax(q k^T scale + bias)``.

    The mean runs over heads and all queries (HiPrune, equation 3). Memory beyond the result is
    ``O(heads * N)`` and one block.

    Args:
        query: ``(B, h, Nq, d)``.
        key: ``(B, h, Nk, d)``.
        scale: Factor of the scores.
        key_bias: ``(B, Nk)``, added to the scores of each key; or ``None``.
        mask: Broadcasts to ``(B, h, Nq, Nk)``: added if floating, ``False`` excludes if bool.

    Returns:
        ``(B, Nk)``, float32; each row sums to one.
    """
    fast, key = _on_gpu(query), key.to(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        if fast is not None:
            found: Tensor = fast.attention_received(query, key, scale, key_bias, mask)
            return found
        return composed_attention_received(query, key, scale, key_bias, mask)


@attention_received.register_fake
def _(
    query: Tensor, key: Tensor, scale: float, key_bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


def composed_most_similar(tokens: Tensor, among: Tensor) -> Tensor:
    """:func:`most_similar` in ATen operations, on any device."""
    unit = torch.nn.functional.normalize(among.float(), dim=-1).to(tokens.dtype).transpose(1, 2)
    images, count, _ = tokens.shape
    found = torch.empty(images, count, dtype=torch.int64, device=tokens.device)
    for rows in _blocks(count, 4 * images * among.shape[1]):
        found[:, rows] = torch.bmm(tokens[:, rows], unit).argmax(-1)
    return found


@torch.library.custom_op("tokenpass::most_similar", mutates_args=())
def most_similar(tokens: Tensor, among: Tensor) -> Tensor:
    """For each token the position of the most similar of some others, by cosine.

    Args:
        tokens: ``(B, M, C)``.
        among: ``(B, K, C)``.

    Returns:
        ``(B, M)``, int64, in ``range(K)``; of equally similar ones the first.
    """
    fast = _on_gpu(tokens)
    with torch.autocast(tokens.device.type, enabled=False):
        if fast is not None:
            found: Tensor = fast.most_similar(tokens, among)
            return found
        return composed_most_similar(tokens, among)


@most_similar.register_fake
def _(tokens: Tensor, among: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[:2], dtype=torch.int64)


@register_flop_formula(torch.ops.tokenpass.attention_received)
def _received_flops(
    query: torch.Size, key: torch.Size, *args: object, out_shape: object = None, **kwargs: object
) -> int:
    images, heads, queries, width = query
    return 2 * images * heads * queries * key[2] * width


@register_flop_formula(torch.ops.tokenpass.most_similar)
def _similar_flops(
    tokens: torch.Size, among: torch.Size, *args: object, out_shape: object = None, **kwargs: object
) -> int:
    images, count, width = tokens
    return 2 * images * count * among[1] * width


# torch 2.13 has no formula for the fused attention of the CPU, so FlopCounterMode leaves it out
# there and counts it on every other device.
_FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if _CPU_ATTENTION not in flop_registry:
    register_flop_formula(_CPU_ATTENTION, get_raw=True)(flop_registry[_FLASH_ATTENTION])
