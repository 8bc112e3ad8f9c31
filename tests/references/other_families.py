"""How the encoders of transformers and torchvision embed, attend and pool."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tests.references.token_reduction import Heads


class Transformers:
    """CLIP, SigLIP, ViT and DINOv2 of transformers, which name the same layers differently.

    Args:
        model: The encoder.
        blocks: Where its blocks are, and within a block ``norms``, ``attention`` and, in the
            attention, ``project``.
    """

    def __init__(
        self,
        model: Any,
        *,
        blocks: str = "encoder.layers",
        norms: tuple[str, str] = ("layer_norm1", "layer_norm2"),
        attention: str = "self_attn",
        project: str = "out_proj",
    ) -> None:
        self.model = model
        self.blocks = attrgetter(blocks)(model)
        self.prefix = 1
        self._norm1, self._norm2 = map(attrgetter, norms)
        self._attention = attrgetter(attention)
        self._project = attrgetter(f"{attention}.{project}")

    def embed(self, images: Tensor) -> Tensor:
        return self.model.embeddings(images)  # type: ignore[no-any-return]

    def attention(self, block: Any, stream: Tensor, positions: Tensor) -> Heads:
        attention, x = self._attention(block), self._norm1(block)(stream)
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        return Heads.of([layer(x) for layer in layers], self.model.config.num_attention_heads)

    def finish(self, block: Any, stream: Tensor, mixed: Tensor) -> Tensor:
        unscaled = nn.Identity()
        stream = stream + getattr(block, "layer_scale1", unscaled)(self._project(block)(mixed))
        branch = block.mlp(self._norm2(block)(stream))
        return stream + getattr(block, "layer_scale2", unscaled)(branch)  # type: ignore[no-any-return]

    def outputs(self, stream: Tensor, pooled: Tensor) -> list[Tensor]:
        raise NotImplementedError


class Clip(Transformers):
    def embed(self, images: Tensor) -> Tensor:
        return self.model.pre_layrnorm(self.model.embeddings(images))  # type: ignore[no-any-return]

    def outputs(self, stream: Tensor, pooled: Tensor) -> list[Tensor]:
        return [stream, self.model.post_layernorm(pooled[:, 0])]


class Siglip(Transformers):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.prefix = 0

    def outputs(self, stream: Tensor, pooled: Tensor) -> list[Tensor]:
        norm = self.model.post_layernorm
        return [norm(stream), self.model.head(norm(pooled))]


class Vit(Transformers):
    def __init__(self, model: Any) -> None:
        norms = ("layernorm_before", "layernorm_after")
        super().__init__(
            model, blocks="layers", norms=norms, attention="attention", project="o_proj"
        )

    def outputs(self, stream: Tensor, pooled: Tensor) -> list[Tensor]:
        norm = self.model.layernorm
        return [norm(stream), self.model.pooler(norm(pooled))]


class Dinov2(Transformers):
    def __init__(self, model: Any) -> None:
        names = {"attention": "attention", "project": "o_proj"}
        super().__init__(model, blocks="encoder.layer", norms=("norm1", "norm2"), **names)

    def outputs(self, stream: Tensor, pooled: Tensor) -> list[Tensor]:
        norm = self.model.layernorm
        return [norm(stream), norm(pooled)[:, 0]]


class Torchvision:
    """Its attention is ``torch.nn.MultiheadAttention``."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = model.encoder.layers
        self.prefix = 1

    def embed(self, images: Tensor) -> Tensor:
        patches = self.model.conv_proj(images).flatten(2).transpose(1, 2)
        first = self.model.class_token.expand(len(images), -1, -1)
        return torch.cat([first, patches], 1) + self.model.encoder.pos_embedding  # type: ignore[no-any-return]

    def attention(self, block: Any, stream: Tensor, positions: Tensor) -> Heads:
        joint = block.self_attention
        projections = linear(block.ln_1(stream), joint.in_proj_weight, joint.in_proj_bias)
        return Heads.of(projections.chunk(3, -1), joint.num_heads)

    def finish(self, block: Any, stream: Tensor, mixed: Tensor) -> Tensor:
        stream = stream + block.self_attention.out_proj(mixed)
        return stream + block.mlp(block.ln_2(stream))  # type: ignore[no-any-return]

    def outputs(self, stream: Tensor, pooled: Tensor) -> list[Tensor]:
        return [self.model.heads(self.model.encoder.ln(pooled)[:, 0])]
