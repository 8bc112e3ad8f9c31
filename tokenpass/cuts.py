"""What each cut of a call did, for those who want to see it (``record_cuts=True``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """One cut of a call. ``B`` images, ``N`` patch tokens on the grid, ``K`` left.

    Attributes:
        kept: Grid positions of the tokens that it left, ``(B, K)``, ascending.
        owner: For each token of the grid the grid position of the token that stands for it,
            ``(B, N)``; ``None`` where tokens are discarded.
    """

    kept: Tensor
    owner: Tensor | None


def as_outputs(cuts: Iterable[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """What a rewritten graph returns of its cuts, to be read by :func:`from_outputs`.

    Args:
        cuts: Grid positions of the tokens that a cut leaves, ``(B, K)``, and into which of them
            each token of the grid went, ``(B, N)``, or ``None``.
    """
    return [tensor for pair in cuts for tensor in pair if tensor is not None]


def from_outputs(tensors: Sequence[Tensor], merged: bool) -> list[Cut]:
    """The cuts in the outputs of a rewritten graph.

    Args:
        tensors: From :func:`as_outputs`.
        merged: Whether dropped tokens were merged, so that every cut has owners.
    """
    if not merged:
        return [Cut(positions, None) for positions in tensors]
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [Cut(positions, positions.gather(1, owner)) for positions, owner in pairs]
