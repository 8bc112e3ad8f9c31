"""Attention that is kept up to date, as compiled code for CPUs (``exact_attention.cpp``).

The compiler is the one that Inductor uses, and what it makes is cached where Inductor's is. Float32
only; whoever has no compiler, or other tensors, takes :mod:`tokenpass.running_softmax` instead.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import astuple, dataclass
from importlib import resources

import torch
from torch import Tensor

from tokenpass import torch_internals as internals

log = logging.getLogger("tokenpass")

SOURCE = "exact_attention.cpp"


class _Heads(ctypes.Structure):
    """``(B, h, N, width)``; the last dimension has stride 1."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("image", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    )


class _Bias(ctypes.Structure):
    """``(B, h, N, N)``, of any strides."""

    _fields_ = (*_Heads._fields_, ("key", ctypes.c_int64))


class _Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "heads", "groups", "tokens")),
        *((name, ctypes.c_int64) for name in ("depth", "width", "threads")),
        ("scale", ctypes.c_float),
    )


class _Some(ctypes.Structure):
    """Positions ``(B, count)``; all where there is no data."""

    _fields_ = (("data", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Attend(ctypes.Structure):
    _fields_ = (
        *((name, _Heads) for name in ("query", "key", "value")),
        ("bias", _Bias),
        *((name, _Heads) for name in ("out", "lse")),
    )


class _Exchange(ctypes.Structure):
    _fields_ = (
        *((name, _Heads) for name in ("query", "old_key", "old_value", "key", "value")),
        ("changed", _Some),
        ("bias", _Bias),
        *((name, _Heads) for name in ("out", "lse", "drift")),
        *((name, ctypes.c_float) for name in ("score_unit", "lse_limit", "rounding")),
        *((name, ctypes.c_float) for name in ("drift_limit", "dense_share")),
        ("refreshed", ctypes.c_int64),
        ("errors", _Heads),  # filled in
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled code; ``None`` where it cannot be had."""
    source = resources.files("tokenpass").joinpath(SOURCE).read_text(encoding="utf-8")
    try:
        return internals.cpp_library(source)
    except Exception as error:  # whatever is wrong with a compiler
        log.info("no compiled attention, tensor operations take its place: %s", error)
        return None


def available(*tensors: Tensor | None) -> bool:
    """Whether tensors like these can be worked on; ``None`` stands for no bias."""
    fit = all(x is None or (x.is_cpu and x.dtype == torch.float32) for x in tensors)
    return fit and _library() is not None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write the attention of the queries at ``rows`` ``(B, R)``, or of all, into the state.

    Arguments are as in :func:`tokenpass.attention_rows.compute`; a bias is added.
    """
    library, kept = _library(), _Kept()
    assert library is not None
    sizes = _sizes(query, key, value, scale)
    views = (kept.heads(x) for x in (query, key, value))
    whole = _Attend(*views, kept.bias(bias), _state(out), _lines(lse))
    some = kept.some(rows, query.shape[2])
    library.tokenpass_attend(*(ctypes.byref(x) for x in (sizes, whole, some)))


@dataclass(frozen=True)
class Limits:
    """When rows are computed anew (:mod:`tokenpass.incremental`, :mod:`tokenpass.running_softmax`).

    Attributes:
        score_unit: Size of scores beyond which rounding them counts.
        lse_limit: Rows whose sum of exponentials has a larger logarithm are computed anew.
        rounding: Drift of a row in a frame in which next to nothing changed.
        drift_limit: Rows with more drift are computed anew.
        dense_share: Share of rows to compute anew from which on all are.
        refreshed: At least so many of those that did not change are computed anew.
    """

    score_unit: float
    lse_limit: float
    rounding: float
    drift_limit: float
    dense_share: float
    refreshed: int


def update(
    query: Tensor,
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    changed: Tensor,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    drift: Tensor,
    limits: Limits,
) -> None:
    """Exchange old keys for new ones in the state, and compute changed queries anew.

    Args:
        query: ``(B, h, N, d)``.
        old: Keys ``(B, hk, U, d)`` and values ``(B, hk, U, dv)`` that the state contains.
        new: All keys ``(B, hk, N, d)`` and values ``(B, hk, N, dv)`` as they are now.
        changed: Positions of the old ones, ``(B, U)``, no two equal.
        scale: Factor of the scores.
        bias: Added to the scores of all keys.
        out: State ``(B, h, N, dv)``, updated, as are ``lse`` and ``drift``.
        lse: State ``(B, h, N)``.
        drift: State ``(B, N)``.
        limits: When else rows are computed anew.
    """
    library, kept = _library(), _Kept()
    assert library is not None
    whole = _Exchange(
        *(kept.heads(x) for x in (query, *old, *new)),
        kept.some(changed, 0),
        kept.bias(bias),
        _state(out),
        _lines(lse),
        _lines(drift[:, None]),
        *astuple(limits),
    )
    sizes = _sizes(query, *new, scale)
    library.tokenpass_update(ctypes.byref(sizes), ctypes.byref(whole))


class _Kept:
    """Makes views of tensors, and keeps copies alive as long as it lives."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []

    def heads(self, x: Tensor) -> _Heads:
        if x.stride(3) != 1:
            x = x.contiguous()
            self._alive.append(x)
        return _state(x)

    def some(self, places: Tensor | None, tokens: int) -> _Some:
        if places is None:
            return _Some(None, tokens)
        places = places.contiguous()
        self._alive.append(places)
        return _Some(places.data_ptr(), places.shape[1])

    def bias(self, x: Tensor | None) -> _Bias:
        if x is None:
            return _Bias(None, 0, 0, 0, 0)
        self._alive.append(x)
        steps = (step if size > 1 else 0 for size, step in zip(x.shape, x.stride(), strict=True))
        return _Bias(x.data_ptr(), *steps)


def _state(x: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), *x.stride()[:3])


def _lines(x: Tensor) -> _Heads:
    """A number for each row: ``(B, h, N)``."""
    return _Heads(x.data_ptr(), *x.stride())


def _sizes(query: Tensor, key: Tensor, value: Tensor, scale: float) -> _Sizes:
    (images, heads, tokens, depth), groups = query.shape, key.shape[1]
    threads = torch.get_num_threads()
    return _Sizes(images, heads, groups, tokens, depth, value.shape[3], threads, scale)
