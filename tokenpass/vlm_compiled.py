"""Prefill with a compiled language model, in a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenpass.errors import OptionError
from tokenpass.visual_path import with_forwards


class CompiledPrefill:
    """A model whose language model is compiled for prompts; single steps run as they do.

    Lengths are symbolic, so that another budget, which makes another length, compiles nothing.

    Args:
        model: The whole model.
        decoder: Its language model, one of its modules.
        inner: A backend of ``torch.compile``.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, inner: str | Callable[..., Any]):
        self._model = model
        self._decoder = decoder
        self._compiled = torch.compile(decoder.forward, backend=inner, dynamic=True)

    def model(self) -> Any:
        """The model as it is now, with the compiled language model; for one call."""
        names = [name for name, module in self._model.named_modules() if module is self._decoder]
        if not names:
            raise OptionError("inner: get_decoder() is no module of the model: use inner=None")
        return with_forwards(self._model, {names[0]: self._forward})

    def _forward(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args]
            length = next((x.shape[1] for x in given if isinstance(x, Tensor)), 0)
            cache = kwargs.get("past_key_values")
            started = cache is not None and cache.get_seq_length() > 0
            return (run if started or length < 2 else self._compiled)(*args, **kwargs)

        return forward
