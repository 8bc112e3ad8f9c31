"""Prompts with some placeholders taken out: plain tensors, no models.

Shapes: ``B`` prompts of ``L`` tokens, ``L'`` afterwards. Rows that lose different numbers of tokens
are padded again, on the side where they were padded before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenpass.errors import OptionError

IGNORED_LABEL = -100
"""The label that losses leave out."""


@dataclass(frozen=True)
class Cut:
    """Which tokens of each prompt stay, and where they go.

    Attributes:
        index: Position in the full prompt that each new position takes, ``(B, L')``, int64.
        real: Where the new prompt holds a token and not padding, ``(B, L')``, bool.
    """

    index: Tensor
    real: Tensor

    def apply(self, x: Tensor, padding: float) -> Tensor:
        """``x`` ``(..., B, L)`` on the tokens that stay, ``(..., B, L')``."""
        taken = x.gather(-1, self.index.expand(*x.shape[:-1], -1))
        return taken.masked_fill(~self.real, padding)


def cut_prompts(
    prompts: Tensor, attention_mask: Tensor | None, kept: Sequence[tuple[int, Tensor]]
) -> Cut:
    """Take placeholders out of prompts.

    Args:
        prompts: ``(B, L)``.
        attention_mask: ``(B, L)``; what is 0 before the first or behind the last 1 is padding.
        kept: For each kind of placeholder its id and, for each one in reading order, whether it
            stays; bool.

    Raises:
        OptionError: If the prompts have another number of placeholders.
    """
    stay = torch.ones_like(prompts, dtype=torch.bool)
    for placeholder, mask in kept:
        found = prompts == placeholder
        if int(found.sum()) != len(mask):
            raise OptionError(
                f"{int(found.sum())} placeholders (token {placeholder}) in input_ids for "
                f"{len(mask)} visual tokens"
            )
        stay[found] = mask.to(stay.device)
    inside, left = _without_padding(prompts, attention_mask)
    stay &= inside
    counts = stay.sum(1)
    length = int(counts.max())
    order = (~stay).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]
    real = torch.arange(length, device=prompts.device) < counts[:, None]
    if left:
        shift = (torch.arange(length, device=prompts.device) + counts[:, None]) % max(1, length)
        order, real = order.gather(1, shift), real.gather(1, shift)
    return Cut(order, real)


def runs_of(prompts: Tensor, placeholder: int, counts: Sequence[int]) -> list[list[int]]:
    """Lengths of the unbroken runs of placeholders that each of some entries fills; none of 0.

    Args:
        prompts: ``(B, L)``.
        placeholder: Its id.
        counts: Placeholders of each entry, in reading order. If there are others than these in the
            prompts, every entry is one run; :func:`cut_prompts` will refuse it.
    """
    rows, columns = (prompts == placeholder).nonzero(as_tuple=True)
    if len(rows) != sum(counts):
        return [[count] for count in counts]
    broken = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1] + 1)
    runs, start = [], 0
    for count in counts:
        ends = broken[start : start + max(0, count - 1)].nonzero().squeeze(1) + 1
        edges = [0, *ends.tolist(), *[count] * (count > 0)]
        runs.append([b - a for a, b in pairwise(edges)])
        start += count
    return runs


def _without_padding(prompts: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, bool]:
    """Where prompts are no padding, and whether they are padded on the left."""
    if attention_mask is None:
        return torch.ones_like(prompts, dtype=torch.bool), True
    real = attention_mask.bool()
    begun = real.cumsum(1) > 0
    open_ = real.flip(1).cumsum(1).flip(1) > 0
    return begun & open_, bool(real[:, -1].all())


def padding_for(name: str, pad_token: int) -> int:
    """What fills an argument where a prompt was padded."""
    if name == "input_ids":
        return pad_token
    return IGNORED_LABEL if name == "labels" else 0


def cut_arguments(arguments: Mapping[str, Any], cut: Cut, pad_token: int) -> dict[str, Any]:
    """Every tensor argument that runs along the prompt, ``(..., B, L)``, cut alike.

    The first label of a prompt, which nothing predicts, stays without effect behind new padding.
    """
    shape = arguments["input_ids"].shape
    made = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[-2:] == shape:
            if name == "labels":
                value = torch.cat((torch.full_like(value[:, :1], IGNORED_LABEL), value[:, 1:]), 1)
            made[name] = cut.apply(value, padding_for(name, pad_token))
    made["attention_mask"] = cut.apply(
        torch.ones(shape, dtype=torch.int64, device=cut.index.device)
        if arguments.get("attention_mask") is None
        else arguments["attention_mask"],
        0,
    )
    return made
