"""What a user's file holds: functions that return a model and its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny

CLASSES = 5
SIDE = 16
DEPTH = 4


class Classifier(nn.Module):
    """Small encoder of 8 x 8 patches, mean over the tokens, classes."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [tiny.Block() for _ in range(DEPTH)]
        self.encoder = tiny.Encoder(blocks, side=SIDE)
        self.head = nn.Linear(tiny.WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).mean(1))  # type: ignore[no-any-return]


def classifier() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    return Classifier(), torch.randn(1, 3, SIDE, SIDE)


def by_name() -> tuple[nn.Module, dict[str, Tensor]]:
    model, images = classifier()
    return model, {"images": images}


def convolution() -> tuple[nn.Module, Tensor]:
    """Nothing in it attends."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(1, 3, SIDE, SIDE)


def only_model() -> nn.Module:
    return classifier()[0]


def failing() -> Any:
    raise RuntimeError("no weights here\nand a second line")


def wrong_inputs() -> tuple[nn.Module, Tensor]:
    return classifier()[0], torch.randn(1, 4, SIDE, SIDE)
