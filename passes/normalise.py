"""One spelling for each operation.

:data:`DECOMPOSITIONS` are applied while a graph is traced: what only moves elements about comes out
as ``reshape``, ``permute``, ``slice``, ``select``, ``expand``, ``unsqueeze``, ``squeeze`` and
``cat``; ``einsum`` as the batched product that it is computed with; what does nothing in this graph
(dropout in eval mode, a cast to the same dtype) as nothing. A decomposition that answers
``NotImplemented`` leaves the operator as it is. But for fused layers the same kernels run as
before, so the numbers stay the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenpass.passes.fast_path import FAST_PATH
from tokenpass.passes.view_spellings import VIEW_SPELLINGS

aten = torch.ops.aten


def _dropout(x: Tensor, p: float, train: bool) -> Any:
    return x if not train or p == 0.0 else NotImplemented


def _cast(x: Tensor, dtype: torch.dtype, *rest: Any, **options: Any) -> Any:
    plain = not any(rest) and not any(options.values())
    return x if plain and x.dtype == dtype else NotImplemented


def _cast_and_move(
    x: Tensor, device: torch.device, dtype: torch.dtype, *rest: Any, **options: Any
) -> Any:
    plain = x.device == torch.device(device) and not any(rest) and not any(options.values())
    return x if plain and x.dtype == dtype else NotImplemented


def _type_as(x: Tensor, other: Tensor) -> Tensor:
    return x.to(device=other.device, dtype=other.dtype)


def _metadata_assertion(x: Tensor, *expected: Any, **named: Any) -> None:
    """Nothing: the dtype is what tracing has just found, and it would hold on to all tokens."""


OTHER_NAMES = (
    aten.absolute,
    aten.adjoint,
    aten.atleast_1d,
    aten.atleast_2d,
    aten.atleast_3d,
    aten.clip,
    aten.column_stack,
    aten.concat,
    aten.concatenate,
    aten.cosine_similarity,
    aten.divide,
    aten.dstack,
    aten.einsum,
    aten.greater,
    aten.greater_equal,
    aten.hstack,
    aten.inner,
    aten.less,
    aten.less_equal,
    aten.linalg_matmul,
    aten.multiply,
    aten.negative,
    aten.not_equal,
    aten.ravel,
    aten.row_stack,
    aten.square,
    aten.subtract,
    aten.take_along_dim,
    aten.tensordot,
    aten.true_divide,
    aten.vstack,
)
"""Operators that are other names, or compositions, of operators with rules."""


def _compositions() -> dict[Any, Callable[..., Any]]:
    """Each overload's own composition of simpler operators."""
    overloads = [
        getattr(packet, name)
        for packet in OTHER_NAMES
        for name in packet.overloads()  # type: ignore[no-untyped-call]
        if not name.endswith(("out", "_"))
    ]
    scalars = (aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
    return {overload: overload.decompose for overload in (*overloads, *scalars)}


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **VIEW_SPELLINGS,
    aten.type_as.default: _type_as,
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.alpha_dropout.default: _dropout,
    aten.to.dtype: _cast,
    aten.to.device: _cast_and_move,
    aten._assert_tensor_metadata.default: _metadata_assertion,
    **_compositions(),
    **FAST_PATH,
}
