"""Dominant tokens and merged contextual ones, after VisionZip (arXiv 2412.04467)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenpass.visual_tokens import VisualTokens

DOMINANT = 54 / 64
"""Share of dominant tokens among those that stay: the paper's setting for 64 tokens."""


def visionzip(tokens: VisualTokens, budget: int) -> tuple[Tensor, Tensor]:
    """Tokens that much attention goes to, and means of groups of the others.

    Dominant tokens are ranked by the attention of the class token, or, without one, by the
    attention that tokens receive. The targets are taken from the others in equal steps; each
    remaining token joins the target with the most similar key (without keys: feature), and a
    target's feature becomes the mean of its group. Differs from the paper in one point: features
    are averaged behind the projector, where they are at hand.

    Returns:
        Positions ``(K,)``, ascending, and the features of these, ``(K, D)``.
    """
    scores = tokens.deep_scores if tokens.class_scores is None else tokens.class_scores
    dominant = min(budget, max(1, round(budget * DOMINANT)))
    order = scores.argsort(descending=True, stable=True)
    others = order[dominant:].sort().values
    contextual = budget - dominant
    kept, features = order[:dominant], tokens.features[order[:dominant]]
    if contextual:
        steps = torch.arange(contextual, device=others.device) * len(others) // contextual
        targets = others[steps]
        unit = normalize(tokens.features.float() if tokens.keys is None else tokens.keys, dim=1)
        group = (unit[others] @ unit[targets].T).argmax(1)
        group[steps] = torch.arange(contextual, device=others.device)
        total = tokens.features.new_zeros(contextual, tokens.features.shape[1])
        total = total.index_add(0, group, tokens.features[others])
        size = torch.bincount(group, minlength=contextual).to(total.dtype)
        kept = torch.cat((kept, targets))
        features = torch.cat((features, total / size[:, None]))
    rank = kept.argsort()
    return kept[rank], features[rank]
