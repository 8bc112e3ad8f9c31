"""What one graph of a model knows of the values that another one takes in.

A graph break cuts a model in two, and the second graph sees a tensor but not where its tokens come
from. So where tokens of the image lie in a graph's outputs is noted with these tensors, as long as
they live, and a graph that takes such a tensor in begins with what is known of it. Every call notes
axes of its own: tokens of two images are different tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import sympy
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tokenpass.dims import (
    Axis,
    AxisTable,
    Dim,
    Dims,
    Factor,
    Kind,
    Size,
    is_data,
    same,
    size_of,
    whole,
)
from tokenpass.errors import OptionError

Arrival: TypeAlias = tuple[Dim | None, ...]
"""The dimensions of a tensor: tokens, or channels; ``None`` where neither is known."""

Arrivals: TypeAlias = Sequence[Arrival]
"""One for each input of a graph, or each output; empty where nothing is known."""

Axes: TypeAlias = dict[Axis, Axis]
"""For the axes that a graph was understood with, those of a call."""


@dataclass(frozen=True)
class _Note:
    """Where tokens lie in a tensor, and how often something had been written into it."""

    arrival: Arrival
    version: int


_notes: Any = WeakIdKeyDictionary()


def arrival_of(value: Any) -> Arrival:
    """What is known of a tensor that a graph handed over, if nothing was written into it since."""
    note: _Note | None = _notes.get(value) if isinstance(value, Tensor) else None
    return note.arrival if note and note.version == _version(value) else ()


def arrivals_of(values: Iterable[Any]) -> list[Arrival]:
    """What is known of each of them."""
    return [arrival_of(value) for value in values]


def mark_tokens(
    x: Tensor, grid: Sequence[int], *, dim: int = 1, prefix: int = 0, suffix: int = 0
) -> Tensor:
    """Say where patch tokens lie in a tensor that a compiled model takes in.

    For what tokenpass cannot see: the blocks of an encoder compiled without its patch embedding,
    tokens that eager code has computed between two graphs. Mark the tensor of every call, the first
    one too, before the call; with tensors that are not marked the model runs as it is.

    Args:
        x: Tokens: ``(B, N, C)``, or another order of these; packed ones are ``(N, C)``.
        grid: Rows and columns of the patch tokens, ``(H, W)``; or ``(T, H, W)``.
        dim: The dimension that tells tokens apart.
        prefix: Class and register tokens before the patch tokens. They never leave.
        suffix: The same behind them.

    Returns:
        ``x`` itself.

    Raises:
        OptionError: If ``x`` does not have as many tokens.
    """
    if not -x.dim() <= dim < x.dim():
        raise OptionError(f"dim={dim}: the tensor has {x.dim()} dimensions, {tuple(x.shape)}")
    found, wanted = x.shape[dim], prefix + prod(grid) + suffix
    if min(*grid, 1 + prefix, 1 + suffix) < 1 or found != wanted:
        raise OptionError(
            f"dimension {dim} of {tuple(x.shape)} has {found} tokens, not {prefix} + "
            f"{' x '.join(map(str, grid))} + {suffix} = {wanted}: pass the grid of the patch "
            "tokens, and in prefix= and suffix= how many others lie before and behind them"
        )
    sides = (_axis(Kind.SPATIAL, size) for size in grid)
    patches = tuple(factor for side in sides for factor in whole(side))
    others = [whole(_axis(Kind.CONSTANT, size)) for size in (prefix, suffix)]
    known: list[Dim | None] = [None] * x.dim()
    channels = [place for place in range(x.dim()) if place != dim % x.dim()][-1:]
    for place in channels:
        known[place] = whole(_axis(Kind.CONSTANT, x.shape[place]))
    parts = [others[0]] * (prefix > 0) + [patches] + [others[1]] * (suffix > 0)
    known[dim] = AxisTable().concat(parts, None)
    _notes[x] = _Note(tuple(known), _version(x))
    return x


def _axis(kind: Kind, size: int) -> Axis:
    """A new axis."""
    return Axis(kind, sympy.Integer(size), None, data=kind is not Kind.CONSTANT)


def begin_with(arrival: Arrival, dims: Dims) -> Dims:
    """The dimensions of an input, those that are known in place of new ones."""
    if len(arrival) != len(dims):
        return dims
    return tuple(
        own if known is None or not same(size_of(known), size_of(own)) else known
        for known, own in zip(arrival, dims, strict=True)
    )


def packed(rows: Axis) -> Axis:
    """An axis of the input that counts patches of images, as such."""
    return Axis(Kind.PACKED, rows.size, None, data=True)


def tokens_in(dims: Iterable[Dim], patches: Mapping[Axis, Axis]) -> Arrival:
    """What is known of ``dims``: positions of an image, or that nothing of the input is in there.

    Empty if there are no positions.

    Args:
        dims: Of a tensor.
        patches: Axes of the input that count patches, as such.
    """
    named = (tuple(replace(f, axis=patches.get(f.axis, f.axis)) for f in dim) for dim in dims)
    found = tuple(_known(dim) for dim in named)
    return found if _holds_tokens(found) else ()


def _known(dim: Dim) -> Dim | None:
    size = size_of(dim)
    if not is_data(dim):
        return whole(Axis(Kind.CONSTANT, size, None, data=False)) if size.is_Integer else None
    return dim if _of_an_image(dim) else None


def _holds_tokens(arrival: Arrival) -> bool:
    return any(dim is not None and is_data(dim) for dim in arrival)


@dataclass(frozen=True)
class Handover:
    """What a graph was understood with, and what it tells of what it returns.

    Attributes:
        expected: For each input.
        told: For each output.
    """

    expected: Arrivals = ()
    told: Arrivals = ()

    def axes(self, inputs: Sequence[Any]) -> Axes | None:
        """The axes of a call; ``None`` if its inputs are others than the graph was made for."""
        axes: Axes = {}
        for value, expected in zip(inputs, self.expected, strict=False):
            if expected and not _agree(expected, arrival_of(value), axes):
                return None
        return axes

    def tell(self, axes: Axes | None, outputs: Sequence[Any]) -> None:
        """Note where tokens lie in what a call returned; nothing, if its inputs were others."""
        if axes is None:
            return
        made = dict(axes)
        for value, told in zip(outputs, self.told, strict=False):
            if told and isinstance(value, Tensor) and not arrival_of(value):
                arrival = _in_axes_of_call(told, value, made)
                if _holds_tokens(arrival):
                    _notes[value] = _Note(arrival, _version(value))


def _in_axes_of_call(told: Arrival, value: Tensor, made: Axes) -> Arrival:
    if value.dim() != len(told):
        return ()
    return tuple(
        _of_call(dim, made) if dim is not None and _positions(dim) == size else None
        for dim, size in zip(told, value.shape, strict=True)
    )


def _positions(dim: Dim) -> int:
    """The size of a dimension of numbers; this runs in every call."""
    return prod(int(factor.size) for factor in dim)


def _version(value: Tensor) -> int:
    """How often something was written into a tensor; inference mode does not count."""
    return 0 if value.is_inference() else value._version


# ---------------------------------------------------------------- axes


def _of_an_image(dim: Dim) -> bool:
    """Whether something in ``dim`` is a position of an image, and all sizes are numbers."""
    pieces = list(_pieces(dim))
    return (
        all(f.size.is_Integer and f.stride.is_Integer for f in pieces)
        and all(f.axis.kind is not Kind.OPAQUE for f in pieces)
        and any(f.axis.kind in (Kind.SPATIAL, Kind.PACKED) or _is_digit(f) for f in pieces)
    )


def _pieces(dim: Dim) -> Iterator[Factor]:
    """The digits of a dimension and, within them, those that their axes were put together from."""
    for factor in dim:
        yield factor
        for inner in (*factor.axis.parts, factor.axis.source):
            yield from _pieces(inner)


def _is_digit(factor: Factor) -> bool:
    """Whether this is a part of an axis of the input: rows of patches, of rows of pixels."""
    return factor.axis.kind is Kind.INPUT and not same(factor.size, factor.axis.size)


def _agree(expected: Arrival, actual: Arrival, axes: Axes) -> bool:
    return len(expected) == len(actual) and all(
        one is None or not is_data(one) or (other is not None and _same_dim(one, other, axes))
        for one, other in zip(expected, actual, strict=True)
    )


def _same_dim(expected: Dim, actual: Dim, axes: Axes) -> bool:
    return len(expected) == len(actual) and all(
        one.stride == other.stride
        and one.size == other.size
        and _same_axis(one.axis, other.axis, axes)
        for one, other in zip(expected, actual, strict=True)
    )


def _same_axis(expected: Axis, actual: Axis, axes: Axes) -> bool:
    """Whether an axis of a call is made as the expected one is, and is the same at every place."""
    if expected in axes:
        return axes[expected] is actual
    alike = (
        _plain(expected) == _plain(actual)
        and len(expected.parts) == len(actual.parts)
        and all(
            _same_dim(one, other, axes)
            for one, other in zip(expected.parts, actual.parts, strict=True)
        )
        and _same_dim(expected.source, actual.source, axes)
    )
    if alike:
        axes[expected] = actual
    return alike


def _plain(axis: Axis) -> tuple[Kind, Size, bool, Size]:
    return axis.kind, axis.size, axis.data, axis.offset


def _of_call(dim: Dim, made: Axes) -> Dim:
    """``dim`` in the axes of a call."""
    return tuple(Factor(_axis_of_call(f.axis, made), f.stride, f.size) for f in dim)


def _axis_of_call(axis: Axis, made: Axes) -> Axis:
    if axis not in made:
        parts = tuple(_of_call(part, made) for part in axis.parts)
        source = _of_call(axis.source, made)
        made[axis] = Axis(axis.kind, axis.size, None, axis.data, parts, source, axis.offset)
    return made[axis]
