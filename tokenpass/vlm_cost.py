"""What a shorter prompt saves in the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenpass.prompts import Cut
from tokenpass.vlm_protocol import Protocol


@dataclass(frozen=True)
class PromptStats:
    """The last call's prompts.

    Attributes:
        visual_tokens_before, visual_tokens: Visual tokens of all prompts, and those that stayed.
        length_before, length: Tokens of the longest prompt, padding included.
        prefill_flops_before, prefill_flops: Linear layers and attention of the language model over
            all prompts; every linear layer counts, so those of experts that are not used do too.
        cache_bytes_before, cache_bytes: Keys and values of the prompts in the model's dtype.
    """

    visual_tokens_before: int
    visual_tokens: int
    length_before: int
    length: int
    prefill_flops_before: int
    prefill_flops: int
    cache_bytes_before: int
    cache_bytes: int

    @property
    def cache_bytes_saved(self) -> int:
        return self.cache_bytes_before - self.cache_bytes


def prompt_stats(
    protocol: Protocol, prompts: Tensor, cut: Cut, kept: Sequence[tuple[int, Tensor]]
) -> PromptStats:
    """Count for prompts ``(B, L)`` of which ``kept`` placeholders stay."""
    rows, before = prompts.shape
    after = cut.index.shape[1]
    return PromptStats(
        visual_tokens_before=sum(len(mask) for _, mask in kept),
        visual_tokens=sum(int(mask.sum()) for _, mask in kept),
        length_before=before,
        length=after,
        prefill_flops_before=rows * _flops(protocol, before),
        prefill_flops=rows * _flops(protocol, after),
        cache_bytes_before=rows * before * _cache_bytes(protocol),
        cache_bytes=rows * after * _cache_bytes(protocol),
    )


def _flops(protocol: Protocol, length: int) -> int:
    text = protocol.model.config.get_text_config()
    linear = sum(
        module.in_features * module.out_features
        for module in protocol.decoder.modules()
        if isinstance(module, nn.Linear)
    )
    heads, width = _heads(text)
    layers = int(text.num_hidden_layers)
    return 2 * length * linear + 4 * length * length * heads * width * layers


def _cache_bytes(protocol: Protocol) -> int:
    """Bytes of the keys and values of one token."""
    text = protocol.model.config.get_text_config()
    heads, width = _heads(text)
    keys = getattr(text, "num_key_value_heads", None) or heads
    size = next(protocol.decoder.parameters()).element_size()
    return int(2 * text.num_hidden_layers * keys * width * size)


def _heads(text: Any) -> tuple[int, int]:
    heads = int(text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, int(width)
