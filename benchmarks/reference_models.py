"""The models that are measured."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn

from benchmarks.data import data_file
from examples import saliency

_DECLARED: list[torch.library.Library] = []


def declare_operators() -> None:
    """Let torchvision be imported, which timm and transformers do.

    Its wheels are built for CUDA: with a CPU build of torch its operators are missing, and two of
    them have to be declared first.
    """
    if "torchvision" not in sys.modules and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _DECLARED.append(library)


def create(name: str, **options: Any) -> nn.Module:
    """A model of timm, in eval mode."""
    declare_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
    model: nn.Module = timm.create_model(name, **options)
    return model.eval()


def deit_tiny() -> nn.Module:
    """DeiT-Tiny/16 for ImageNet-1k: ``(B, 3, 224, 224)`` to 1000 logits."""
    model = create("deit_tiny_patch16_224")
    model.load_state_dict(_weights("deit_tiny_patch16_224.pt"))
    return model


def dinov2_saliency() -> saliency.Saliency:
    """DINOv2-S/14 with its saliency decoder, weights rounded to float16."""
    parts = _weights("dinov2_vits14_saliency.pt")
    state = {f"{part}.{name}": x.float() for part in parts for name, x in parts[part].items()}
    return saliency.build(state)


def vit_small(depth: int = 12, size: int = 224) -> nn.Module:
    """ViT-S/16 at ``size`` x ``size`` with random weights."""
    torch.manual_seed(0)
    return create("vit_small_patch16_224", depth=depth, img_size=size)


def _weights(name: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(data_file(name), map_location="cpu", weights_only=True)
    return state
