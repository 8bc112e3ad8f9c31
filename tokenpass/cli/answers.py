"""How far the answers of two models are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenpass.cli.screen import InputError

LOGITS = "logits"
"""The output that is the answer where a model names several."""


def answer_of(outputs: Any) -> Tensor:
    """What counts as the answer: the logits, or else the first tensor of floats, ``(B, ...)``.

    Raises:
        InputError: If there is none.
    """
    if isinstance(outputs, Mapping) and isinstance(outputs.get(LOGITS), Tensor):
        return outputs[LOGITS]  # type: ignore[no-any-return]
    values = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    for leaf in torch.utils._pytree.tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim():
            return leaf
    raise InputError("the model returns no tensor of floats: there is no answer to compare")


def classifies(answer: Tensor) -> bool:
    """Whether an answer ``(B, C)`` is taken for the scores of classes."""
    return answer.dim() == 2


def agreement(found: Tensor, expected: Tensor) -> Tensor:
    """For each image how far two answers agree, ``(B,)``, float64, 1 for entirely.

    Of classifiers, whether the class is the same; of others the cosine of the answers, which is
    taken over everything that belongs to an image.
    """
    if classifies(expected):
        return (found.argmax(1) == expected.argmax(1)).double()
    first, second = (answer.double().flatten(1) for answer in (found, expected))
    return functional.cosine_similarity(first, second, dim=1)
