"""Small versions of encoders from timm, transformers and torchvision, with random weights.

Few blocks, narrow, small images; the code paths are those of the full models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

SEED = 7
DEPTH = 4
GRID = (8, 8)


@dataclass(frozen=True)
class Entry:
    """One encoder.

    Attributes:
        name: As its library calls it.
        make: Builds it.
        size: Side of the images that it takes.
        prefix: Prefix tokens.
    """

    name: str
    make: Callable[[], nn.Module]
    size: int
    prefix: int

    def build(self) -> nn.Module:
        """The model in eval mode, its random weights spread enough to matter."""
        torch.manual_seed(SEED)
        model = self.make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.abs().max() < 1e-3 or "gamma" in name or "lambda" in name:
                    parameter.normal_(0.0, 0.2)
        return model

    def images(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED + batch)
        return torch.randn(batch, 3, self.size, self.size, generator=generator)


def _timm(name: str, size: int, **options: object) -> Callable[[], nn.Module]:
    def make() -> Any:
        return timm.create_model(name, img_size=size, depth=DEPTH, num_classes=10, **options)

    return make


NARROW = {"embed_dim": 96, "num_heads": 3}

HF_SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 8,
}


def _clip() -> Any:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF_SIZES))


def _siglip() -> Any:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF_SIZES))


def _vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**HF_SIZES))


def _dinov2() -> Any:
    sizes = {**HF_SIZES, "mlp_ratio": 2}
    del sizes["intermediate_size"]
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))


def _torchvision() -> Any:
    sizes = {"image_size": 64, "patch_size": 8, "hidden_dim": 96, "mlp_dim": 192}
    return torchvision.models.VisionTransformer(
        **sizes, num_layers=DEPTH, num_heads=3, num_classes=10
    )


def _entry(name: str, size: int, prefix: int, **options: Any) -> Entry:
    return Entry(f"timm/{name}", _timm(name, size, **options), size, prefix)


ENTRIES = [
    _entry("vit_tiny_patch16_224", 128, 1),
    _entry("deit_tiny_distilled_patch16_224", 128, 2),
    _entry("deit3_small_patch16_224", 128, 1, **NARROW),
    _entry("vit_small_patch14_dinov2", 112, 1, **NARROW),
    _entry("vit_small_patch14_reg4_dinov2", 112, 5, **NARROW),
    _entry("vit_base_patch16_siglip_224", 128, 0, **NARROW),
    _entry("vit_base_patch16_clip_224", 128, 1, **NARROW),
    _entry("eva02_tiny_patch14_224", 112, 1),
    _entry("vit_small_patch16_dinov3", 128, 5, **NARROW),
    _entry("beit_base_patch16_224", 128, 1, **NARROW),
    Entry("transformers/CLIPVisionModel", _clip, 64, 1),
    Entry("transformers/SiglipVisionModel", _siglip, 64, 0),
    Entry("transformers/ViTModel", _vit, 64, 1),
    Entry("transformers/Dinov2Model", _dinov2, 64, 1),
    Entry("torchvision/vit_b_16", _torchvision, 64, 1),
]
"""All have :data:`DEPTH` blocks and :data:`GRID` patch tokens."""

QUICK = "timm/vit_small_patch14_reg4_dinov2"
VARIED = {
    QUICK,
    "timm/deit_tiny_distilled_patch16_224",
    "timm/vit_base_patch16_siglip_224",
    "timm/eva02_tiny_patch14_224",
    "timm/beit_base_patch16_224",
    "transformers/CLIPVisionModel",
    "torchvision/vit_b_16",
}
"""Those of which no two are spelled alike."""


def parameters(names: Collection[str]) -> list[Any]:
    """Encoders as parameters of a test; the quick loop takes :data:`QUICK` only."""
    return [
        pytest.param(e, id=e.name, marks=[] if e.name == QUICK else [pytest.mark.slow])
        for e in ENTRIES
        if e.name in names
    ]


MODELS = parameters([entry.name for entry in ENTRIES])
DIFFERENT = parameters(VARIED)

BY_NAME = {entry.name: entry for entry in ENTRIES}


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    leaves = torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value expected."""
    worst = 0.0
    pairs = zip(tensors(found), tensors(expected), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
        assert a.dtype == b.dtype
        scale = max(float(b.detach().abs().max()), 1e-12)
        worst = max(worst, float((a.detach().double() - b.detach().double()).abs().max()) / scale)
    return worst
