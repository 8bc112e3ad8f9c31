"""Token merging after ToMe (arXiv 2210.09461), written from the paper: the yardstick.

Plain PyTorch around a ViT of timm; shares no code with tokenpass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode


class ToMe(nn.Module):
    """A ViT in which every block merges ``merged`` pairs of tokens, between attention and MLP.

    Args:
        model: A vision transformer of timm with one class token in front.
        merged: ``r`` of the paper.
    """

    def __init__(self, model: nn.Module, merged: int) -> None:
        super().__init__()
        self.model: Any = model
        self.merged = merged

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        stream = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        sizes = stream.new_ones(stream.shape[:2])
        for block in model.blocks:
            mixed, keys = proportional_attention(block.attn, block.norm1(stream), sizes)
            stream = stream + block.ls1(mixed)
            stream, sizes = merge_pairs(stream, sizes, keys, self.merged)
            stream = stream + block.ls2(block.mlp(block.norm2(stream)))
        logits: Tensor = model.forward_head(model.norm(stream))
        return logits


def proportional_attention(attention: Any, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in which a token of size ``s`` weighs as much as ``s`` tokens.

    Args:
        attention: timm's module.
        x: ``(B, N, C)``.
        sizes: ``(B, N)``.

    Returns:
        The result ``(B, N, C)``, and the keys ``(B, N, d)``, a mean over the heads.
    """
    joint = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = joint.permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    bias = sizes.log()[:, None, None, :]
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attention.proj(mixed.transpose(1, 2).flatten(2)), key.mean(dim=1)


def merge_pairs(
    stream: Tensor, sizes: Tensor, features: Tensor, wanted: int
) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: the ``wanted`` most similar pairs become one token each.

    Tokens at even places look for the most similar token at an odd place. The class token, at
    place 0, looks for none; nothing is asked of the order of the others.

    Args:
        stream: ``(B, N, C)``.
        sizes: ``(B, N)``.
        features: What similarity is measured on, ``(B, N, d)``.
        wanted: At most every even token but the class token is merged.
    """
    unit = functional.normalize(features, dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf
    best, partner = similarity.max(dim=-1)
    leaving = min(wanted, best.shape[1] - 1)
    order = best.argsort(dim=-1, descending=True)
    gone, staying = order[:, :leaving], order[:, leaving:].sort(dim=-1).values
    into = partner.gather(1, gone)

    mass = torch.cat((stream * sizes[..., None], sizes[..., None]), dim=-1)
    even, odd = mass[:, ::2], mass[:, 1::2]
    odd = odd.scatter_add(1, _wide(into, mass), even.gather(1, _wide(gone, mass)))
    left = torch.cat((even.gather(1, _wide(staying, mass)), odd), dim=1)
    return left[..., :-1] / left[..., -1:], left[..., -1]


def _wide(positions: Tensor, like: Tensor) -> Tensor:
    return positions[..., None].expand(-1, -1, like.shape[-1])


def count_flops(model: nn.Module, images: Tensor) -> int:
    """FLOPs of a call."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images)
    total: int = counter.get_total_flops()
    return total
