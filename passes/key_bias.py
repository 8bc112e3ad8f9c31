"""A bias for each key, added to the scores of an attention without taking it apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tokenpass.blocks import Attention
from tokenpass.dims import Dims
from tokenpass.graph import arguments
from tokenpass.layout import Layout


def with_key_bias(
    node: fx.Node,
    attention: Attention,
    bias: Tensor,
    layout: Layout,
    dims: Dims,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the softmax, or of the fused operator, with a bias for each key.

    Args:
        node: The softmax or the fused operator.
        attention: The attention that it belongs to.
        bias: ``(B, Nk)``.
        layout: Where batch and tokens lie.
        dims: Of the node's result.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    if not attention.fused:
        place = arguments(node)["dim"] % len(dims)
        scores = args[0] + layout.align(bias, place, dims).to(args[0].dtype)
        return (scores, *args[1:]), kwargs
    names = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, args, strict=False)) | kwargs
    frame = (*dims[:-1], attention.key_dim)
    wide = layout.align(bias, len(frame) - 1, frame).to(args[0].dtype)
    mask = given.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        wide = wide.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        wide = wide + mask
    given["attn_mask"] = wide
    return (), {name: given[name] for name in names if name in given}
