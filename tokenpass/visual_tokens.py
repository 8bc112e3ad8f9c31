"""Visual tokens of one image, and HiPrune's rule on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpass.errors import OptionError
from tokenpass.methods import HiPrune
from tokenpass.selection import anchors_and_buffers, best, select
from tokenpass.visual_grid import Raster


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image, from which a selector chooses; ``M`` of them.

    Scores of a token that is made of several patches are means over these.

    Attributes:
        features: What the language model is given, ``(M, D)``.
        object_scores: Attention received in the object layer, ``(M,)``, float32.
        deep_scores: Attention received in the deep layer, ``(M,)``, float32.
        class_scores: Attention that the class token pays in the deep layer, ``(M,)``; ``None`` for
            an encoder without one.
        keys: Keys of the deep layer, mean over heads, ``(M, d)``; ``None`` where they are not seen.
        raster: Where the tokens lie; ``None`` where that is not known.
    """

    features: Tensor
    object_scores: Tensor
    deep_scores: Tensor
    class_scores: Tensor | None = None
    keys: Tensor | None = None
    raster: Raster | None = None

    def __len__(self) -> int:
        return len(self.features)

    def only(self, places: Tensor) -> VisualTokens:
        """Some of the tokens as an image of their own; ``places`` is ``(K,)``, ascending."""
        if len(places) == len(self):
            return self
        return VisualTokens(
            features=self.features[places],
            object_scores=self.object_scores[places],
            deep_scores=self.deep_scores[places],
            class_scores=None if self.class_scores is None else self.class_scores[places],
            keys=None if self.keys is None else self.keys[places],
            raster=None if self.raster is None else self.raster.only(places),
        )


Selection = Tensor | tuple[Tensor, Tensor]
"""Positions that stay, ``(K,)``, ascending; with them their features ``(K, D)`` if they change."""

Selector = Callable[[VisualTokens, int], Selection]
"""A pure function of visual tokens and of the number that may stay."""


def hiprune(method: HiPrune, tokens: VisualTokens, budget: int) -> Tensor:
    """Anchors, buffers and registers among the tokens of one image, ``(K,)``, ascending.

    Raises:
        OptionError: If the tokens have no grid for buffers, or the published code fails.
    """
    if method.ranking == "random":
        return torch.randperm(len(tokens), device=tokens.features.device)[:budget].sort().values
    deep, first = tokens.deep_scores, tokens.object_scores
    if method.ranking == "class":
        if tokens.class_scores is None:
            raise OptionError('ranking="class": the encoder has no class token')
        deep = first = tokens.class_scores
    raster = tokens.raster
    if raster is None:
        if method.alpha > 0:
            raise OptionError(
                f"{len(tokens)} visual tokens whose places in the image are not known: anchors "
                "have no neighbours; pass alpha=0"
            )
        raster = Raster((1, 1, len(tokens)), torch.arange(len(tokens), device=deep.device))
    if method.compat:
        return _published(method, tokens, raster)
    absent = torch.full((1, _area(raster)), -torch.inf, device=deep.device)
    wide_first, wide_deep = absent.clone(), absent.clone()
    wide_first[0, raster.places], wide_deep[0, raster.places] = first, deep
    safe = anchors_and_buffers(method, wide_first, raster.shape, budget) & ~absent_in(raster)
    kept = best(safe, wide_deep, budget)[0]
    token = torch.empty(_area(raster), dtype=torch.int64, device=deep.device)
    token[raster.places] = torch.arange(len(tokens), device=deep.device)
    return token[kept].sort().values


def absent_in(raster: Raster) -> Tensor:
    """Places of a raster that hold no token, ``(1, T * H * W)``, bool."""
    mask = torch.ones(1, _area(raster), dtype=torch.bool, device=raster.places.device)
    mask[0, raster.places] = False
    return mask


def _area(raster: Raster) -> int:
    frames, height, width = raster.shape
    return frames * height * width


def _published(method: HiPrune, tokens: VisualTokens, raster: Raster) -> Tensor:
    """The published code's selection, which knows full grids only."""
    if _area(raster) != len(tokens):
        raise OptionError(
            f"compat={method.compat!r}: {len(tokens)} visual tokens do not fill a grid of "
            f"{raster.shape}; use compat=False"
        )
    order = raster.places.argsort()
    first, deep = tokens.object_scores[order][None], tokens.deep_scores[order][None]
    return order[select(method, first, deep, raster.shape)[0]].sort().values
