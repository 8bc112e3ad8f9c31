"""A determinantal choice of tokens, after CDPruner (arXiv 2506.10967) without the text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenpass.visual_tokens import VisualTokens

ROUNDING = 1e-12
"""Below this what is left of a token's weight is rounding; other tokens come first."""


def determinantal(tokens: VisualTokens, budget: int) -> Tensor:
    """``budget`` tokens that together span the largest volume, greedily, ``(K,)``, ascending.

    The kernel is ``r_i * cos(i, j) * r_j``: cosines of features, weighted with the attention that a
    token receives in the deep layer, scaled to at most one (the paper weights with the relevance
    to the instruction, which is not at hand before the language model). The greedy maximum of the
    determinant is found with incremental Cholesky factors (Chen et al., NeurIPS 2018).
    """
    unit = normalize(tokens.features.detach().double(), dim=1)
    relevance = tokens.deep_scores.double()
    relevance = relevance / relevance.max().clamp(min=ROUNDING)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance[None]
    rest = kernel.diagonal().clone()
    factors = kernel.new_zeros(budget, len(tokens))
    chosen: list[int] = []
    for number in range(budget):
        best = int(rest.argmax())
        chosen.append(best)
        row = kernel[best] - factors[:number, best] @ factors[:number]
        factors[number] = row / rest[best].clamp(min=ROUNDING).sqrt()
        rest = rest - factors[number] ** 2
        rest[chosen] = -torch.inf
    return torch.tensor(chosen, device=unit.device).sort().values
