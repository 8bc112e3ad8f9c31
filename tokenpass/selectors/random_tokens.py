"""Random tokens: the baseline that any other selection must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpass.visual_tokens import VisualTokens


def random_tokens(tokens: VisualTokens, budget: int) -> Tensor:
    """``budget`` of the tokens, each set of them as likely as any other; ``(K,)``, ascending.

    Random numbers are torch's: ``torch.manual_seed`` repeats a choice.
    """
    order = torch.randperm(len(tokens), device=tokens.features.device)
    return order[:budget].sort().values
