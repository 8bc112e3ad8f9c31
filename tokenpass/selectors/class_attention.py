"""Attention of the class token, after FasterVLM (arXiv 2412.01818)."""

from __future__ import annotations

from torch import Tensor

from tokenpass.errors import OptionError
from tokenpass.visual_tokens import VisualTokens


def class_attention(tokens: VisualTokens, budget: int) -> Tensor:
    """The ``budget`` tokens that the class token attends to most, ``(K,)``, ascending.

    Of equal scores the first token comes first.

    Raises:
        OptionError: If the encoder has no class token.
    """
    if tokens.class_scores is None:
        raise OptionError(
            "class_attention: the encoder has no class token; choose another selector, or rank by "
            "the attention that tokens receive"
        )
    order = tokens.class_scores.argsort(descending=True, stable=True)
    return order[:budget].sort().values
