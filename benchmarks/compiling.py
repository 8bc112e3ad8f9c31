"""Compiled models, and the certainty that they were rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import tokenpass

Name = TypeVar("Name")


def compiled(model: nn.Module, **options: Any) -> Any:
    """``model`` compiled with tokenpass."""
    return torch.compile(model, backend="tokenpass", options=options)


def calls(functions: dict[Name, Any], images: Tensor) -> dict[Name, Callable[[], Any]]:
    """Functions of images as functions of nothing, to be timed."""

    def on_images(function: Any) -> Callable[[], Any]:
        return lambda: function(images)

    return {name: on_images(function) for name, function in functions.items()}


def flops_share(fast: Any) -> float:
    """FLOPs of the last call as a share of the unpruned model's.

    Raises:
        RuntimeError: If nothing was pruned: a measurement of it would mean nothing.
    """
    report = tokenpass.report(fast)
    if not report.converted:
        reasons = "; ".join(item.reason for item in report.refusals)
        raise RuntimeError(f"the model was left as it is: {reasons}")
    stats = tokenpass.stats(fast)
    share: float = stats.flops / stats.flops_before
    return share
