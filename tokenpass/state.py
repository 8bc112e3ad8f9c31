"""The tensors that a stream remembers between frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Name = tuple[object, ...]


@dataclass(frozen=True)
class Slot:
    """One tensor of a stream's state.

    Attributes:
        name: What it is to the graphs: number of the gate or attention, kind, place.
        shape: Its shape.
        dtype: Its type.
        device: Where it lies.
    """

    name: Name
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class StateTable:
    """State tensors by name, while a graph is traced."""

    def __init__(self, slots: Sequence[Slot], tensors: Sequence[Tensor]) -> None:
        self._tensors = {s.name: x for s, x in zip(slots, tensors, strict=True)}

    def __getitem__(self, name: Name) -> Tensor:
        return self._tensors[name]


def fresh_state(slots: Sequence[Slot]) -> list[Tensor]:
    """Fixed buffers for a new stream. Also inside of inference mode these are ordinary tensors."""
    with torch.inference_mode(False):
        return [torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in slots]
