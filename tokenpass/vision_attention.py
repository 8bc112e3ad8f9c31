"""Watching the attention of a vision encoder while the encoder runs as it is.

For encoders that no single graph holds: packed images, lists of lengths, any-resolution crops. The
fused attention stays fused; the attention that keys receive is computed beside it, in blocks
(:func:`tokenpass.kernels.attention_received`). Nothing of the model is changed.

Words: a *layer* is a module in which attention is computed, counted from 1 in the order of first
calls; a *sequence* is one row of a batch in one call; *flat tokens* are the tokens of a layer over
calls, rows of the batch and positions, in this order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode

from tokenpass import torch_internals as internals
from tokenpass.kernels import attention_received

SOFTMAX = (torch.softmax, Tensor.softmax, torch.nn.functional.softmax)


@dataclass
class Layer:
    """One attention layer of the run.

    Attributes:
        shapes: ``(B, N)`` of each call; an empty list of a layer that is no self-attention.
        received: Attention that each flat token receives, ``(tokens,)``, float32; where asked for.
        from_first: Attention that the first token of each sequence pays, ``(tokens,)``, likewise.
        keys: Keys averaged over heads, ``(tokens, d)``, likewise; ``None`` if no keys were seen.
        outputs: What the calls returned, where a probe was asked for.
    """

    shapes: list[tuple[int, int]] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)
    from_first: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    crossed: bool = False

    @property
    def layout(self) -> tuple[tuple[int, int], ...]:
        return tuple(self.shapes)


@dataclass(frozen=True)
class Call:
    """One call of a module behind a probe.

    Attributes:
        module: Which.
        inputs: Its positional arguments, or ``None`` where there were others.
        output: What it returned.
        attends: Whether attention was computed inside.
        behind: Whether it began after the probed layer ran.
    """

    module: nn.Module
    inputs: tuple[Any, ...] | None
    output: Any
    attends: bool
    behind: bool


def sequence_lengths(layout: Iterable[tuple[int, int]]) -> list[int]:
    """Tokens of each sequence of a layer whose calls have shapes ``(B, N)``."""
    return [tokens for rows, tokens in layout for _ in range(rows)]


class AttentionWatch(TorchFunctionMode):
    """A context in which the attention layers that run in this thread are written down.

    Args:
        scored: Numbers of the layers whose attention is scored.
        probed: Number of the layer whose outputs become starting points of gradients.

    Attributes:
        layers: By module, in the order of first calls.
        calls: Calls of modules that ended after the probed layer ran, in this order.
    """

    def __init__(self, scored: Sequence[int] = (), probed: int | None = None) -> None:
        super().__init__()
        self.layers: dict[nn.Module | None, Layer] = {}
        self.calls: list[Call] = []
        self._attended = 0
        self._scored = frozenset(scored)
        self._probed = probed
        self._inside: list[tuple[nn.Module, int, bool]] = []
        self._thread = threading.get_ident()
        self._hooks: list[Any] = []

    def __enter__(self) -> AttentionWatch:
        self._hooks = [
            modules.register_module_forward_pre_hook(self._entered),
            modules.register_module_forward_hook(self._left, with_kwargs=True, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            internals.remove_global_hook(hook)

    @property
    def sorted_layers(self) -> list[Layer]:
        """The layers by their numbers."""
        return list(self.layers.values())

    def _entered(self, module: nn.Module, args: object) -> None:
        if threading.get_ident() == self._thread:
            self._inside.append((module, self._attended, self._probing))

    def _left(self, module: nn.Module, args: Any, *rest: Any) -> None:
        """``rest`` are keyword arguments and output; the latter alone after an exception."""
        if threading.get_ident() == self._thread and self._inside:
            _, before, behind = self._inside.pop()
            if self._probing:
                inputs = args if len(rest) == 2 and not rest[0] else None
                attends = self._attended > before
                self.calls.append(Call(module, inputs, rest[-1], attends, behind))

    @property
    def _probing(self) -> bool:
        return any(layer.outputs for layer in self.layers.values())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is scaled_dot_product_attention:
            return self._fused(out, *args, **(kwargs or {}))
        if func in SOFTMAX and isinstance(out, Tensor) and out.dim() == 4:
            return self._written_out(out)
        return out

    def _layer(self, queries: Tensor, keys: int) -> tuple[Layer, int]:
        """The layer of a call and its number; ``queries`` is ``(B, h, Nq, ...)``."""
        owner = self._inside[-1][0] if self._inside else None
        self._attended += 1
        layer = self.layers.setdefault(owner, Layer())
        layer.shapes.append((queries.shape[0], queries.shape[2]))
        layer.crossed |= queries.shape[2] != keys
        return layer, list(self.layers).index(owner) + 1

    def _fused(
        self,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.dim() != 4 or is_causal:
            return out
        layer, number = self._layer(query, key.shape[2])
        if number in self._scored and not layer.crossed:
            with torch.no_grad():
                factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
                self._score(layer, query.detach(), key.detach(), factor, attn_mask)
        return self._started(layer, number, out)

    @staticmethod
    def _score(layer: Layer, query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        first = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])[:, :, :1]
        layer.received.append(attention_received(query, key, scale, None, mask).flatten())
        paid = attention_received(query[:, :, :1], key, scale, None, first)
        layer.from_first.append(paid.flatten())
        layer.keys.append(key.float().mean(1).flatten(0, 1))

    def _written_out(self, probabilities: Tensor) -> Tensor:
        """A softmax over keys, ``(B, h, Nq, Nk)``, which the model materialises itself."""
        layer, number = self._layer(probabilities, probabilities.shape[-1])
        if number in self._scored and not layer.crossed:
            with torch.no_grad():
                maps = probabilities.detach()
                layer.received.append(maps.mean((1, 2), dtype=torch.float32).flatten())
                layer.from_first.append(maps[:, :, 0].mean(1, dtype=torch.float32).flatten())
        return self._started(layer, number, probabilities)

    def _started(self, layer: Layer, number: int, out: Tensor) -> Tensor:
        """``out`` as a point that gradients can be taken at; from here on they are recorded."""
        if number != self._probed:
            return out
        if not out.requires_grad:
            torch.set_grad_enabled(True)
            out = out.detach().requires_grad_()
        layer.outputs.append(out)
        return out
