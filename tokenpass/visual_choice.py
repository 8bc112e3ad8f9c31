"""Which visual tokens stay, and the encoder's output with only these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenpass.errors import OptionError
from tokenpass.methods import HiPrune
from tokenpass.selection import token_budget
from tokenpass.visual_encoder import Encoded, mapped
from tokenpass.visual_tokens import Selector, VisualTokens, hiprune
from tokenpass.vlm_protocol import Modality

ENCODER_FIELDS = ("last_hidden_state", "hidden_states", "attentions", "pooler_output")
"""Fields of an encoder's output that are not cut along with the visual tokens."""


@dataclass(frozen=True)
class Chosen:
    """Visual tokens of one modality after the selection.

    Attributes:
        modality: Which.
        full: The encoder's output with all visual tokens.
        output: The same with those that stay.
        kept: For each image the positions that stay, ascending.
        mask: For all visual tokens whether they stay, bool.
    """

    modality: Modality
    full: Any
    output: Any
    kept: list[Tensor]
    mask: Tensor


def choose(
    modality: Modality, method: HiPrune, selector: Selector | None, arguments: Mapping[str, Any]
) -> Chosen:
    """Encode the images or videos of a call, and choose among the tokens of each.

    Raises:
        OptionError: If the method or the selector does not fit them.
    """
    encoded = modality.encoder(method, modality.inputs(arguments))
    if method.compat == "llava" and isinstance(method.keep, int):
        # the published code shares the budget among all images of a batch
        method = replace(method, keep=max(1, method.keep // len(encoded.tokens)))
    kept, features = [], []
    for rows, may_leave, tokens in zip(
        encoded.features, encoded.pruned, encoded.tokens, strict=True
    ):
        picked, changed = _select(tokens, method, selector)
        stay = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        stay[may_leave] = False
        stay[may_leave[picked]] = True
        if changed is not None:
            rows = rows.index_copy(0, may_leave[picked], changed.to(rows.dtype))
        kept.append(stay.nonzero().squeeze(1))
        features.append(rows[kept[-1]])
    masks = [
        torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, stays.cpu(), True)
        for rows, stays in zip(encoded.features, kept, strict=True)
    ]
    output = _cut_output(encoded, kept, features)
    return Chosen(modality, encoded.output, output, kept, torch.cat(masks))


def _select(
    tokens: VisualTokens, method: HiPrune, selector: Selector | None
) -> tuple[Tensor, Tensor | None]:
    if not len(tokens):
        return torch.empty(0, dtype=torch.int64, device=tokens.features.device), None
    budget = token_budget(method.keep, len(tokens))
    if selector is None:
        return hiprune(method, tokens, budget), None
    found = selector(tokens, budget)
    kept, features = found if isinstance(found, tuple) else (found, None)
    if len(kept) > 1 and not bool((kept[1:] > kept[:-1]).all()):
        raise OptionError("a selector must return different positions, ascending")
    return kept, features


def _cut_output(encoded: Encoded, kept: list[Tensor], features: list[Tensor]) -> Any:
    """An encoder's output with the visual tokens that stay, in the form that it had."""
    counts = [len(rows) for rows in encoded.features]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    flat = torch.cat([k + start for k, start in zip(kept, starts, strict=True)])

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[flat] if value.dim() > 1 and len(value) == sum(counts) else value
        if not isinstance(value, (list, tuple)):
            return value
        tensors = all(isinstance(x, Tensor) and x.dim() > 1 for x in value)
        if tensors and [len(x) for x in value] == counts:
            return type(value)(x[k] for x, k in zip(value, kept, strict=True))
        return type(value)(cut(x) for x in value)

    made = mapped(encoded.output, lambda x: x)
    for name in list(encoded.output.keys()):
        if name not in ENCODER_FIELDS:
            made[name] = cut(encoded.output[name])
    if not isinstance(encoded.output["pooler_output"], Tensor):
        made["pooler_output"] = features
    elif len({len(rows) for rows in features}) == 1:
        made["pooler_output"] = torch.stack(features)
    else:
        raise OptionError(
            "images of one tensor must keep equally many visual tokens: the selector kept "
            f"{[len(rows) for rows in features]}"
        )
    return made
