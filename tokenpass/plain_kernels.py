"""The custom operators as plain ATen operations, for programs that run without Python.

They take the same steps as :mod:`tokenpass.kernels`, but the steps are written out in the graph, so
their number must be known when it is traced. A step holds at most :data:`STEP_BYTES` for each image
(or one row), and a compiler may fuse what is in it: memory grows with the tokens, not with their
square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenpass import kernels  # noqa: F401  which registers the operators

STEP_BYTES = 64 * 2**20
"""Scores of an image in one step. At 12 heads one step does for 1182 tokens, 16,384 take 193."""


def _steps(rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, STEP_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def received(
    query: Tensor, key: Tensor, scale: float, key_bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """As :func:`tokenpass.kernels.attention_received`, whose arguments and result these are."""
    _, heads, queries, _ = query.shape
    keys = key.shape[2]
    wide = None if mask is None else mask.expand(query.shape[0], heads, queries, keys)
    sums: list[Tensor] = []
    for rows in _steps(queries, 4 * heads * keys):
        scores = (query[:, :, rows] @ key.transpose(2, 3)) * scale
        if key_bias is not None:
            scores = scores + key_bias.to(query.dtype)[:, None, None, :]
        if wide is not None:
            scores = _masked(scores, wide[:, :, rows])
        sums.append(scores.softmax(-1, dtype=torch.float32).sum(2))
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
    return total.mean(1) / queries


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask


def similar(tokens: Tensor, among: Tensor) -> Tensor:
    """As :func:`tokenpass.kernels.most_similar`, whose arguments and result these are."""
    unit = normalize(among.float(), dim=-1).to(tokens.dtype).transpose(1, 2)
    found = [
        (tokens[:, rows] @ unit).argmax(-1) for rows in _steps(tokens.shape[1], 4 * among.shape[1])
    ]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


PLAIN: dict[Any, Callable[..., Tensor]] = {
    torch.ops.tokenpass.attention_received.default: received,
    torch.ops.tokenpass.most_similar.default: similar,
}
"""For each custom operator of a pruned graph what it is made of."""
