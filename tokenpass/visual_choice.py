"""Which visual tokens stay, and the encoder's output with only these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenpass.errors import OptionError
from tokenpass.methods import HiPrune
from tokenpass.prompts import runs_of
from tokenpass.selection import token_budget
from tokenpass.visual_encoder import Encoded, Scored
from tokenpass.visual_output import ENCODER_FIELDS
from tokenpass.visual_path import mapped
from tokenpass.visual_tokens import Selector, VisualTokens, hiprune
from tokenpass.vlm_protocol import Modality


@dataclass(frozen=True)
class Chosen:
    """Visual tokens of one modality after the selection.

    Attributes:
        modality: Which.
        full: The encoder's output with all visual tokens.
        output: The same with those that stay.
        kept: For each image or video the positions that stay, ascending.
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
    changed: list[Tensor | None] = []

    def pick(images: Sequence[Scored]) -> list[Tensor]:
        runs = _runs(modality, arguments, images)
        wanted = _for_images(method, sum(map(len, runs)))
        changed.clear()
        picked = []
        for image, lengths in zip(images, runs, strict=True):
            parts = _parts(image.pruned, lengths)
            found = [_select(image.tokens.only(part), wanted, selector) for part in parts]
            stays = [part[kept] for part, (kept, _) in zip(parts, found, strict=True)]
            picked.append(torch.cat([image.pruned[:0], *stays]))
            new = [features for _, features in found if features is not None]
            changed.append(torch.cat(new) if new else None)
        return picked

    inputs = modality.inputs(arguments)
    encoded = modality.encoder(method, inputs, pick if selector is None else None)
    picked = pick(encoded.images) if encoded.picked is None else encoded.picked
    kept, features = [], []
    for rows, image, places, new in zip(
        encoded.features, encoded.images, picked, changed, strict=True
    ):
        stay = torch.ones(image.count, dtype=torch.bool, device=rows.device)
        stay[image.pruned] = False
        stay[image.pruned[places]] = True
        if new is not None:
            rows = rows.index_copy(0, image.pruned[places], new.to(rows.dtype))
        kept.append(stay.nonzero().squeeze(1))
        features.append(rows[kept[-1]])
    masks = [
        torch.zeros(image.count, dtype=torch.bool).index_fill_(0, stays.cpu(), True)
        for image, stays in zip(encoded.images, kept, strict=True)
    ]
    runs = [length for lengths in _runs(modality, arguments, encoded.images) for length in lengths]
    mask = torch.cat(masks)
    by_image = [part.nonzero().squeeze(1).to(kept[0].device) for part in torch.split(mask, runs)]
    output = _cut_output(encoded, kept, features)
    return Chosen(modality, encoded.output, output, by_image, mask)


def _runs(
    modality: Modality, arguments: Mapping[str, Any], images: Sequence[Scored]
) -> list[list[int]]:
    """For each entry of the encoder's list the tokens of each image in it.

    A prompt tells the images of one entry apart: text stands between their placeholders. Between
    the frames of a video stands what tells the time; they share one budget.
    """
    counts = [image.count for image in images]
    if modality.name != "image":
        return [[count] for count in counts]
    return runs_of(arguments["input_ids"], modality.placeholder, counts)


def _parts(pruned: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Places in ``pruned`` of the tokens of each run."""
    ends = torch.tensor(lengths, device=pruned.device).cumsum(0)
    run = torch.bucketize(pruned, ends, right=True)
    return [(run == number).nonzero().squeeze(1) for number in range(len(lengths))]


def _for_images(method: HiPrune, images: int) -> HiPrune:
    """The published code for LLaVA shares a budget among all images of a batch."""
    if method.compat == "llava" and isinstance(method.keep, int):
        return replace(method, keep=max(1, method.keep // images))
    return method


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
    elif encoded.output["pooler_output"].dim() == 2:
        (made["pooler_output"],) = features
    elif len({len(rows) for rows in features}) == 1:
        made["pooler_output"] = torch.stack(features)
    else:
        raise OptionError(
            "images of one tensor must keep equally many visual tokens: the selector kept "
            f"{[len(rows) for rows in features]}"
        )
    return made
