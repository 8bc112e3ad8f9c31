"""The most diverse tokens, after DivPrune (arXiv 2503.02175)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenpass.visual_tokens import VisualTokens


def divprune(tokens: VisualTokens, budget: int) -> Tensor:
    """``budget`` tokens whose smallest distance to one another is large (max-min diversity).

    Distance is one minus the cosine of features. The first token is the one whose nearest other
    token is farthest; then always the one that is farthest from its nearest chosen one.

    Returns:
        ``(K,)``, ascending.
    """
    unit = normalize(tokens.features.detach().float(), dim=1)
    distance = 1 - unit @ unit.T
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(1)
    chosen = [int(nearest.argmax())]
    away = distance[chosen[0]].clone()
    while len(chosen) < budget:
        away[chosen] = -torch.inf
        chosen.append(int(away.argmax()))
        away = torch.minimum(away, distance[chosen[-1]])
    return torch.tensor(chosen, device=unit.device).sort().values
