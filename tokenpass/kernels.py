"""Custom operators for what must not materialise an ``N x N`` map.

Each has a reference composition of ATen operations that works in blocks, a fake implementation and
a FLOPs formula. Their inputs are detached by the callers: scores and matches choose tokens, and
choosing has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

BLOCK_BYTES = 4 * 2**20
"""Size of the largest temporary: fits the second-level caches that were tried, far below memory."""


def _blocks(total: int, each_bytes: int) -> Iterator[slice]:
    """Slices of ``range(total)`` of which each needs at most :data:`BLOCK_BYTES`, or is one."""
    step = max(1, BLOCK_BYTES // max(1, each_bytes))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


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
    images, heads, queries, width = query.shape
    keys = key.shape[2]
    q = query.reshape(images * heads, queries, width)
    k = key.reshape(images * heads, keys, width).transpose(1, 2)
    bias = None
    if key_bias is not None:
        bias = key_bias.to(q.dtype)[:, None, None, :].expand(images, heads, 1, keys)
        bias = bias.reshape(images * heads, 1, keys)
    full_mask = None if mask is None else mask.expand(images, heads, queries, keys)
    received = torch.zeros(images * heads, keys, dtype=torch.float32, device=q.device)
    for maps in _blocks(images * heads, 4 * queries * keys):
        for rows in _blocks(queries, 4 * keys * (maps.stop - maps.start)):
            if bias is None:
                scores = torch.bmm(q[maps, rows], k[maps]).mul_(scale)
            else:
                scores = torch.baddbmm(bias[maps], q[maps, rows], k[maps], alpha=scale)
            if full_mask is not None:
                scores = _masked(scores, full_mask, maps, rows, heads)
            received[maps] += scores.softmax(-1, dtype=torch.float32).sum(1)
    return received.reshape(images, heads, keys).mean(1).div_(queries)


def _masked(scores: Tensor, mask: Tensor, maps: slice, rows: slice, heads: int) -> Tensor:
    """Apply the rows of a mask that belong to a run of images and heads."""
    parts = [mask[i // heads, i % heads, rows] for i in range(maps.start, maps.stop)]
    block = torch.stack(parts)
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~block, -torch.inf)
    return scores + block


@attention_received.register_fake
def _(
    query: Tensor, key: Tensor, scale: float, key_bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


@torch.library.custom_op("tokenpass::most_similar", mutates_args=())
def most_similar(tokens: Tensor, among: Tensor) -> Tensor:
    """For each token the position of the most similar of some others, by cosine.

    Args:
        tokens: ``(B, M, C)``.
        among: ``(B, K, C)``.

    Returns:
        ``(B, M)``, int64, in ``range(K)``; of equally similar ones the first.
    """
    unit = torch.nn.functional.normalize(among.float(), dim=-1).to(tokens.dtype).transpose(1, 2)
    images, count, _ = tokens.shape
    found = torch.empty(images, count, dtype=torch.int64, device=tokens.device)
    for rows in _blocks(count, 4 * images * among.shape[1]):
        found[:, rows] = torch.bmm(tokens[:, rows], unit).argmax(-1)
    return found


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
