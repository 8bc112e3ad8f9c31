"""What the path from pixels to visual tokens returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenpass.errors import TokenpassError

ENCODER_FIELDS = ("last_hidden_state", "hidden_states", "attentions", "pooler_output")
"""Fields of an encoder's output that are not cut along with the visual tokens."""


def images_of(output: Any) -> list[Tensor]:
    """The visual tokens of each image, ``(M, D)``, in what a path returned; or of all in one."""
    found = getattr(output, "pooler_output", None)
    if isinstance(found, Tensor) and found.dim() == 2:
        return [found]
    if isinstance(found, Tensor) and found.dim() == 3:
        return list(found)
    if isinstance(found, (list, tuple)) and all(
        isinstance(x, Tensor) and x.dim() == 2 for x in found
    ):
        return list(found)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise TokenpassError(
        "the image features must be (images, tokens, width), (tokens, width) or a list of such in "
        f"pooler_output; found {shape}"
    )


def counts_of(output: Any) -> tuple[int, ...]:
    """The number of visual tokens of each image."""
    return tuple(map(len, images_of(output)))


def fields_of(output: Any) -> list[Any]:
    """What of a path's result runs along the visual tokens, but the tokens themselves."""
    return [output[name] for name in output if name not in ENCODER_FIELDS]
