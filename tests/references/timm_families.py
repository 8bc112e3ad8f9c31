"""How timm's encoders embed, attend and pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.references.token_reduction import Heads


class Vit:
    """ViT, DeiT, DeiT-3, DINOv2, SigLIP and CLIP."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = model.blocks
        self.prefix = model.num_prefix_tokens

    def embed(self, images: Tensor) -> Tensor:
        model = self.model
        patches = model.patch_embed(images)
        patches = patches.flatten(1, -2)
        if model.no_embed_class:
            return model.norm_pre(self._with_prefix(patches + model.pos_embed))  # type: ignore[no-any-return]
        return model.norm_pre(self._with_prefix(patches) + model.pos_embed)  # type: ignore[no-any-return]

    def _with_prefix(self, patches: Tensor) -> Tensor:
        names = ("cls_token", "dist_token", "reg_token")
        tokens = [getattr(self.model, name, None) for name in names]
        given = [token.expand(len(patches), -1, -1) for token in tokens if token is not None]
        return torch.cat([*given, patches], 1)

    def attention(self, block: Any, stream: Tensor, positions: Tensor) -> Heads:
        projections = block.attn.qkv(block.norm1(stream)).chunk(3, -1)
        return Heads.of(projections, block.attn.num_heads)

    def finish(self, block: Any, stream: Tensor, mixed: Tensor) -> Tensor:
        stream = stream + block.ls1(block.attn.proj(mixed))
        return stream + block.ls2(block.mlp(block.norm2(stream)))  # type: ignore[no-any-return]

    def outputs(self, stream: Tensor, pooled: Tensor) -> list[Tensor]:
        model = self.model
        tokens = model.norm(pooled)
        if hasattr(model, "head_dist"):
            return [(model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2]
        return [model.head(model.fc_norm(self._pool(tokens)))]

    def _pool(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self.prefix :]
        match self.model.global_pool:
            case "map":
                return self.model.attn_pool(patches)  # type: ignore[no-any-return]
            case "token":
                return tokens[:, 0]
            case "avg":
                return patches.mean(1)
            case "avgmax":
                return (patches.amax(1) + patches.mean(1)) / 2
        raise NotImplementedError(self.model.global_pool)


class Eva(Vit):
    """EVA-02 and DINOv3: rotary positions, biases of queries and values alone."""

    def embed(self, images: Tensor) -> Tensor:
        model = self.model
        tokens = self._with_prefix(model.patch_embed(images).flatten(1, -2))
        return tokens if model.pos_embed is None else tokens + model.pos_embed

    def attention(self, block: Any, stream: Tensor, positions: Tensor) -> Heads:
        attention = block.attn
        heads = Heads.of(_projections(attention, block.norm1(stream)), attention.num_heads)
        table = self.model.rope.get_embed(shape=self.model.patch_embed.grid_size)[positions]
        sines, cosines = table[:, None].chunk(2, -1)

        def turned(x: Tensor) -> Tensor:
            patches = x[:, :, self.prefix :]
            partner = _half_turn(patches, attention.rotate_half)
            rotated = patches * cosines + partner * sines
            return torch.cat([x[:, :, : self.prefix], rotated], 2)

        return Heads(turned(heads.query), turned(heads.key), heads.value)

    def finish(self, block: Any, stream: Tensor, mixed: Tensor) -> Tensor:
        return _scaled_branches(block, stream, block.attn.proj(block.attn.norm(mixed)))


class Beit(Vit):
    """A table of relative positions in each block, biases of queries and values alone."""

    def embed(self, images: Tensor) -> Tensor:
        return self._with_prefix(self.model.patch_embed(images))

    def attention(self, block: Any, stream: Tensor, positions: Tensor) -> Heads:
        attention = block.attn
        heads = Heads.of(_projections(attention, block.norm1(stream)), attention.num_heads)
        first = torch.arange(self.prefix).expand(len(positions), -1)
        rows = torch.cat([first, positions + self.prefix], 1)
        pairs = attention.relative_position_index[rows[:, :, None], rows[:, None, :]]
        bias = attention.relative_position_bias_table[pairs].permute(0, 3, 1, 2)
        return Heads(heads.query, heads.key, heads.value, bias)

    def finish(self, block: Any, stream: Tensor, mixed: Tensor) -> Tensor:
        return _scaled_branches(block, stream, block.attn.proj(mixed))


def _projections(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values; keys have no bias."""
    query, key, value = linear(x, attention.qkv.weight).chunk(3, -1)
    if attention.q_bias is None:
        return query, key, value
    return query + attention.q_bias, key, value + attention.v_bias


def _half_turn(x: Tensor, halves: bool) -> Tensor:
    """Pairs of channels turned by ninety degrees: neighbours, or one of each half."""
    if halves:
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-second, first], -1).flatten(-2)


def _scaled_branches(block: Any, stream: Tensor, mixed: Tensor) -> Tensor:
    scales = [1.0 if scale is None else scale for scale in (block.gamma_1, block.gamma_2)]
    stream = stream + scales[0] * mixed
    return stream + scales[1] * block.mlp(block.norm2(stream))  # type: ignore[no-any-return]
