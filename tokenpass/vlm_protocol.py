"""What a vision-language model must offer, and the refusal that names what is missing.

The protocol is the one that models of ``transformers`` share: a path from pixels to visual tokens
for each modality, an id of the placeholder that each visual token takes in the prompt, a forward
pass that takes visual tokens computed before, and one language model behind it. Nothing here is
about one architecture, and nothing is imported.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenpass.errors import OptionError, TokenpassError
from tokenpass.visual_encoder import VisualEncoder

MODALITIES = ("image", "video")

PRECOMPUTED = "mm_encoder_outputs"
"""The argument of ``forward`` for visual tokens that were computed before."""


@dataclass(frozen=True)
class Modality:
    """One kind of visual input.

    Attributes:
        name: ``"image"`` or ``"video"``.
        encoder: From pixels to visual tokens.
        pixels: The argument that holds pixels.
        arguments: All arguments of the encoder's path.
        placeholder: Id of the token that stands for a visual token in a prompt.
    """

    name: str
    encoder: VisualEncoder
    pixels: str
    arguments: tuple[str, ...]
    placeholder: int

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder's inputs among the arguments of a call."""
        return {k: given[k] for k in self.arguments if given.get(k) is not None}


@dataclass(frozen=True)
class Protocol:
    """A model that fits.

    Attributes:
        model: The model.
        modalities: Those that it takes.
        decoder: Its language model.
    """

    model: Any
    modalities: tuple[Modality, ...]
    decoder: nn.Module

    def given(self, arguments: Mapping[str, Any]) -> list[Modality]:
        """The modalities that a call has pixels of."""
        return [m for m in self.modalities if arguments.get(m.pixels) is not None]


def protocol_of(model: Any) -> Protocol:
    """Check a model against the protocol.

    Raises:
        OptionError: If a piece of it is missing; the message says which.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise OptionError(f"{name}: expected a vision-language model with a config")
    if getattr(model.config, "is_encoder_decoder", False):
        raise OptionError(f"{name}: prompts of encoder-decoder models are not cut")
    for method in ("generate", "get_decoder", "get_input_embeddings"):
        if not callable(getattr(model, method, None)):
            raise OptionError(f"{name} has no {method}(): pass the model that generates text")
    if PRECOMPUTED not in inspect.signature(model.forward).parameters:
        raise OptionError(
            f"{name}.forward takes no {PRECOMPUTED}: there is no way to give it visual tokens that "
            "were computed before"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise OptionError(
            f"{name} was made under torch.inference_mode: autograd, which finds what visual tokens "
            "are made of, cannot go through such weights; make it outside"
        )
    modalities = tuple(_modalities(model))
    if not modalities:
        wanted = " or ".join(f"get_{m}_features() with config.{m}_token_id" for m in MODALITIES)
        raise OptionError(f"{name} has no {wanted}")
    decoder: nn.Module = cast(Any, model).get_decoder()
    return Protocol(model, modalities, decoder)


def _modalities(model: Any) -> Iterator[Modality]:
    base = getattr(model, "base_model", model)
    for name in MODALITIES:
        run = getattr(base, f"get_{name}_features", None)
        placeholder = getattr(model.config, f"{name}_token_id", None)
        if run is None or placeholder is None:
            continue
        given = [
            p.name
            for p in inspect.signature(run).parameters.values()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        taken = {n for m in (model, base) for n in inspect.signature(m.forward).parameters}
        if given[0] not in taken:
            raise OptionError(
                f"{type(model).__name__}.forward takes no {given[0]}, as get_{name}_features does: "
                "there is no telling which of its arguments holds the pixels"
            )
        encoder = VisualEncoder(base, f"get_{name}_features", _patch_size(model.config))
        yield Modality(name, encoder, given[0], tuple(given), int(placeholder))


def _patch_size(config: Any) -> tuple[int, int] | None:
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if isinstance(patch, int):
        return patch, patch
    if isinstance(patch, (list, tuple)) and len(patch) == 2:
        return int(patch[0]), int(patch[1])
    return None


# ---------------------------------------------------------------- positions


class _SeenError(Exception):
    """Carries what the language model was called with out of a call that stops there."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


@contextmanager
def _stopping_at(decoder: nn.Module) -> Iterator[None]:
    thread = threading.get_ident()

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            raise _SeenError(kwargs)

    hook = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def forward_positions(protocol: Protocol, arguments: Mapping[str, Any]) -> Tensor:
    """The positions that ``forward`` gives the tokens of a prompt, ``(..., B, L)``.

    The model computes them itself: its call is stopped where its language model begins.

    Args:
        protocol: The model.
        arguments: Of ``forward``, with visual tokens in place of pixels.
    """
    try:
        with torch.no_grad(), _stopping_at(protocol.decoder):
            protocol.model(**arguments)
    except _SeenError as seen:
        positions = seen.arguments.get("position_ids")
    else:
        raise TokenpassError("the language model was not called by the model's forward")
    rows, length = arguments["input_ids"].shape
    if positions is None:
        positions = torch.arange(length, device=arguments["input_ids"].device)[None]
    return positions.expand(*positions.shape[:-2], rows, length)


def generation_positions(protocol: Protocol, arguments: Mapping[str, Any]) -> Tensor:
    """The positions that ``generate`` gives the tokens of a prompt, ``(..., B, L)``."""
    given = dict(arguments)
    prompt = given.pop("input_ids")
    if given.get("attention_mask") is None:
        given["attention_mask"] = torch.ones_like(prompt)
    prepare = getattr(protocol.model, "_prepare_position_ids_for_generation", None)
    if prepare is None:
        raise OptionError(
            f"{type(protocol.model).__name__} does not say which positions it generates with: "
            'pass position_ids, or use positions="compact"'
        )
    positions: Tensor = prepare(prompt, given)
    return positions.expand(*positions.shape[:-2], *prompt.shape)
