"""The layouts that the stream of an encoder may have."""

from __future__ import annotations

from torch import Tensor

from tests.fuzz.spec import Encoder


def rows_of(x: Tensor, layout: str) -> Tensor:
    """The stream as tokens ``(B, L, C)``."""
    if layout == "sequence first":
        return x.transpose(0, 1)
    if layout == "channels first":
        return x.transpose(1, 2)
    if layout == "map":
        return x.flatten(1, 2)
    return x.flatten(2).transpose(1, 2) if layout == "image" else x


def stream_of(rows: Tensor, encoder: Encoder) -> Tensor:
    """Tokens ``(B, L, C)`` in the layout of the stream."""
    layout = encoder.layout
    if layout == "sequence first":
        return rows.transpose(0, 1)
    if layout == "channels first":
        return rows.transpose(1, 2)
    if layout == "map":
        rows = rows.unflatten(1, encoder.grid)
    if layout == "image":
        rows = rows.transpose(1, 2).unflatten(2, encoder.grid)
    return rows


def channels_last(x: Tensor, layout: str) -> Tensor:
    """The stream with its channels in the last dimension, and all else in its place."""
    return x.movedim(1, -1) if layout in ("channels first", "image") else x


def as_before(x: Tensor, layout: str) -> Tensor:
    """The inverse of :func:`channels_last`."""
    return x.movedim(-1, 1) if layout in ("channels first", "image") else x
