"""The fused layers that ``nn.TransformerEncoder`` runs without gradients, as what they compute.

A fused layer hides its attention. Those with a mask stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten


def _self_attention(
    x: Tensor, heads: int, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor
) -> Tensor:
    """Multi-head attention of ``x`` ``(B, N, C)`` with itself."""
    images, tokens, channels = x.shape
    joint = functional.linear(x, weight, bias)
    split = joint.reshape(images, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    query, key, value = split.unbind(0)
    attended = functional.scaled_dot_product_attention(query, key, value)
    merged = attended.transpose(1, 2).reshape(images, tokens, channels)
    return functional.linear(merged, out_weight, out_bias)


def _native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    if mask is not None or need_weights or query is not key or key is not value:
        return NotImplemented
    out = _self_attention(query, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias)
    return out, query.new_empty(0)


def _transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Any:
    if mask is not None:
        return NotImplemented

    def attend(x: Tensor) -> Tensor:
        return _self_attention(x, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = functional.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = functional.gelu(hidden) if use_gelu else functional.relu(hidden)
        return functional.linear(hidden, ffn_weight_2, ffn_bias_2)

    def first_norm(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second_norm(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = _added_to(attend(first_norm(src)), src)
        return _added_to(feed_forward(second_norm(x)), x)
    x = first_norm(_added_to(attend(src), src))
    return second_norm(_added_to(feed_forward(x), x))


def _added_to(branch: Tensor, stream: Tensor) -> Tensor:
    """What a fused layer adds, it adds in place: under autocast with the precision of a branch."""
    return (stream + branch).to(branch.dtype)


FAST_PATH: dict[Any, Callable[..., Any]] = {
    aten._native_multi_head_attention.default: _native_multi_head_attention,
    aten._transformer_encoder_layer_fwd.default: _transformer_encoder_layer,
}
