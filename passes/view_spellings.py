"""The many spellings of a view as the few that the axis rules know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    if x.dim() == 0:
        return x.reshape(1)
    start, end = start_dim % x.dim(), end_dim % x.dim()
    merged: Any = 1
    for size in x.shape[start : end + 1]:
        merged = merged * size
    return x.reshape((*x.shape[:start], merged, *x.shape[end + 1 :]))


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    place = dim % x.dim()
    if -1 in sizes:
        known: Any = 1
        for size in sizes:
            known = known * (1 if isinstance(size, int) and size == -1 else size)
        sizes = [x.shape[place] // known if size == -1 else size for size in sizes]
    return x.reshape((*x.shape[:place], *sizes, *x.shape[place + 1 :]))


def _reshape(x: Tensor, size: Sequence[int]) -> Tensor:
    return x.reshape(tuple(size))


def _transpose(x: Tensor, dim0: int, dim1: int) -> Tensor:
    order = list(range(x.dim()))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return x.permute(order)


def _matrix_transpose(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else _transpose(x, -2, -1)


def _reverse(x: Tensor) -> Tensor:
    return x.permute(tuple(reversed(range(x.dim()))))


def _movedim(x: Tensor, source: Any, destination: Any) -> Tensor:
    sources = [source] if isinstance(source, int) else list(source)
    targets = [destination] if isinstance(destination, int) else list(destination)
    moved = {t % x.dim(): s % x.dim() for s, t in zip(sources, targets, strict=True)}
    rest = iter(place for place in range(x.dim()) if place not in moved.values())
    return x.permute([moved[p] if p in moved else next(rest) for p in range(x.dim())])


def _pieces(x: Tensor, borders: Sequence[Any], dim: int) -> list[Tensor]:
    return [aten.slice.Tensor(x, dim, start, stop) for start, stop in pairwise(borders)]


def _split_with_sizes(x: Tensor, split_sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    borders: list[Any] = [0]
    for size in split_sizes:
        borders.append(borders[-1] + size)
    return _pieces(x, borders, dim)


def _split(x: Tensor, split_size: int, dim: int = 0) -> list[Tensor]:
    size = x.shape[dim]
    borders = [*range(0, int(size), int(split_size)), size]
    return _pieces(x, borders, dim)


def _chunk(x: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    return _split(x, -(-int(x.shape[dim]) // chunks), dim)


def _tensor_split(x: Tensor, sections: Any, dim: int = 0) -> list[Tensor]:
    if isinstance(sections, int):
        size, extra = divmod(int(x.shape[dim]), sections)
        sections = [min(i, extra) + i * size for i in range(1, sections)]
    return _pieces(x, [0, *sections, x.shape[dim]], dim)


def _narrow(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    begin = start + x.shape[dim] if start < 0 else start
    return aten.slice.Tensor(x, dim, begin, begin + length)  # type: ignore[no-any-return]


def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [x.select(dim, index) for index in range(int(x.shape[dim]))]


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    place = dim % (tensors[0].dim() + 1)
    return torch.cat([x.unsqueeze(place) for x in tensors], place)


def _expand_as(x: Tensor, other: Tensor) -> Tensor:
    return x.expand(other.shape)


def _broadcast_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))  # type: ignore[no-untyped-call]
    return [x.expand(shape) for x in tensors]


def _reshape_as(x: Tensor, other: Tensor) -> Tensor:
    return x.reshape(other.shape)


def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    repeats = (1,) * (x.dim() - len(repeats)) + tuple(repeats)
    padded = x.reshape((1,) * (len(repeats) - x.dim()) + tuple(x.shape))
    if all(size == 1 or times == 1 for size, times in zip(padded.shape, repeats, strict=True)):
        return padded.expand([s * t for s, t in zip(padded.shape, repeats, strict=True)]).clone()
    split = [size for pair in ((1, s) for s in padded.shape) for size in pair]
    grown = [size for pair in zip(repeats, padded.shape, strict=True) for size in pair]
    merged = [s * t for s, t in zip(padded.shape, repeats, strict=True)]
    return padded.reshape(split).expand(grown).reshape(merged)


def _repeat_interleave(
    x: Tensor, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> Tensor:
    del output_size
    if dim is None:
        x, dim = x.reshape(-1), 0
    place = dim % x.dim()
    grown = (*x.shape[: place + 1], repeats, *x.shape[place + 1 :])
    merged = (*x.shape[:place], x.shape[place] * repeats, *x.shape[place + 1 :])
    return x.unsqueeze(place + 1).expand(grown).reshape(merged)


def _pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    r = upscale_factor
    *lead, c, h, w = x.shape
    split = x.reshape((*lead, c // (r * r), r, r, h, w))
    n = len(lead)
    order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return split.permute(order).reshape((*lead, c // (r * r), h * r, w * r))


def _pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    r = downscale_factor
    *lead, c, h, w = x.shape
    split = x.reshape((*lead, c, h // r, r, w // r, r))
    n = len(lead)
    order = (*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return split.permute(order).reshape((*lead, c * r * r, h // r, w // r))


VIEW_SPELLINGS: dict[Any, Callable[..., Any]] = {
    aten.flatten.using_ints: _flatten,
    aten.unflatten.int: _unflatten,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.view_as.default: _reshape_as,
    aten.reshape_as.default: _reshape_as,
    aten.transpose.int: _transpose,
    aten.swapaxes.default: _transpose,
    aten.swapdims.default: _transpose,
    aten.t.default: _matrix_transpose,
    aten.mT.default: _matrix_transpose,
    aten.numpy_T.default: _reverse,
    aten.movedim.int: _movedim,
    aten.movedim.intlist: _movedim,
    aten.moveaxis.int: _movedim,
    aten.moveaxis.intlist: _movedim,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.split.sizes: _split_with_sizes,
    aten.split.Tensor: _split,
    aten.chunk.default: _chunk,
    aten.tensor_split.indices: _tensor_split,
    aten.tensor_split.sections: _tensor_split,
    aten.narrow.default: _narrow,
    aten.unbind.int: _unbind,
    aten.stack.default: _stack,
    aten.expand_as.default: _expand_as,
    aten.broadcast_to.default: torch.Tensor.expand,
    aten.broadcast_tensors.default: _broadcast_tensors,
    aten.repeat.default: _repeat,
    aten.tile.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.unsafe_chunk.default: _chunk,
    aten.unsafe_split.Tensor: _split,
    aten.unsafe_split_with_sizes.default: _split_with_sizes,
}
