"""Views of tensors, left out where they change nothing: each is a node of the graph being traced.

Symbolic sizes are compared as expressions, so nothing is asked of their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from tokenpass.graph import expression

Extent: TypeAlias = int
"""A size in the running trace: an integer, or a ``torch.SymInt``, which stands in for one."""

REST = -1
"""The size that follows from all others."""


def reshaped(x: Tensor, shape: Sequence[Extent]) -> Tensor:
    """``x.reshape(shape)``; at most one size is :data:`REST`."""
    before, after = [expression(size) for size in x.shape], [expression(size) for size in shape]
    known = [a if b == REST else b for a, b in zip(before, after, strict=False)]
    return x if known == before and len(after) == len(before) else x.reshape(tuple(shape))


def permuted(x: Tensor, order: Sequence[int]) -> Tensor:
    """``x.permute(order)``."""
    return x if list(order) == list(range(x.dim())) else x.permute(tuple(order))


def moved(x: Tensor, source: int, destination: int) -> Tensor:
    """``x.movedim(source, destination)``."""
    return x if source == destination else x.movedim(source, destination)
