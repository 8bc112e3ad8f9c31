"""Inputs of a path to visual tokens: for autograd, as a key, and the sizes that they tell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenpass.visual_grid import Sizes
from tokenpass.visual_path import mapped

MAX_TABLE = 4096
"""Elements up to which an integer input is a table whose values decide on shapes."""

Key = tuple[Any, ...]


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd can be switched on inside, even under inference mode; the mode is put back."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def recorded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that autograd can work with: tensors of inference mode are copied."""
    made: dict[str, Any] = mapped(dict(inputs), lambda x: x.clone() if x.is_inference() else x)
    return made


def _is_table(x: Tensor) -> bool:
    return not x.is_floating_point() and x.dtype != torch.bool and x.numel() <= MAX_TABLE


def key_of(inputs: Mapping[str, Any]) -> Key:
    """Shapes of the inputs and values of tables: inputs with equal keys have equal structure."""

    def part(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(part(x) for x in value)
        if not isinstance(value, Tensor):
            return value
        table = tuple(value.flatten().tolist()) if _is_table(value) else None
        return (tuple(value.shape), value.dtype, value.device, table)

    return tuple((name, part(value)) for name, value in sorted(inputs.items()))


def sizes_of(inputs: Mapping[str, Any], patch: tuple[int, int] | None) -> Sizes:
    """Sizes of pictures and tables of sizes among the inputs; ``patch`` in pixels ``(H, W)``."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    pictures = [tuple(x.shape[-2:]) for x in tensors if x.is_floating_point() and x.dim() >= 4]
    tables = [x for x in tensors if _is_table(x) and x.dim() == 2 and x.shape[1] in (2, 3)]
    return Sizes(tuple((int(h), int(w)) for h, w in pictures), tuple(tables), patch)
