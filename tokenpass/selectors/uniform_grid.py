"""Tokens spread evenly over an image: a baseline that looks at no content."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpass.visual_tokens import VisualTokens


def uniform_grid(tokens: VisualTokens, budget: int) -> Tensor:
    """``budget`` tokens that lie as far apart on the grid as the greedy rule puts them.

    Starting at the middle, the token with the largest distance to all chosen ones is next
    (farthest-point sampling, Gonzalez 1985); of equally far ones the first. Frames and crops lie a
    whole picture apart. Without a grid, the tokens are taken in equal steps.

    Returns:
        ``(K,)``, ascending.
    """
    count = len(tokens)
    device = tokens.features.device
    if tokens.raster is None:
        return torch.div(torch.arange(budget, device=device) * count, budget, rounding_mode="floor")
    _, height, width = tokens.raster.shape
    place = tokens.raster.places
    piece, row, column = place // (height * width), place // width % height, place % width
    points = torch.stack((piece * (height + width), row, column), 1).float()
    middle = torch.tensor([0.0, (height - 1) / 2, (width - 1) / 2], device=device)
    chosen = [int((points - middle).norm(dim=1).argmin())]
    distance = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < budget:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1))
        distance[chosen] = -1
    return torch.tensor(chosen, device=device).sort().values
