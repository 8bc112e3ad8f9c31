"""The plan of a partial pruning: tokens leave the token-wise parts, attention stays. Plain data.

Where attention runs in windows, over pooled keys or in any other form that cannot go without some
tokens, it is computed on all of them; between attentions, token-wise regions run on the tokens that
are left, and every token that is not takes what was computed for the one it was merged into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from tokenpass.blocks import Block
from tokenpass.gating import Region
from tokenpass.grid import is_packed
from tokenpass.methods import HiPrune
from tokenpass.rows import RowLayout


@dataclass(frozen=True)
class Cut:
    """One cut.

    Attributes:
        number: From 1.
        block: The block in which tokens leave, counted from 1.
        at: The stream at the cut: the first addition of the block.
        count: Patch tokens of an image that stay.
    """

    number: int
    block: int
    at: fx.Node
    count: int


@dataclass(frozen=True)
class PartialPruning:
    """All cuts of a graph, and what runs on fewer tokens for them.

    Attributes:
        method: What was asked for.
        layout: How images and tokens lie in values; the order of tokens.
        fixed: Positions of tokens that are no patches, and always stay.
        shape: Patch tokens along each axis of the grid; packed ones are a line.
        cuts: In order.
        regions: What runs on fewer tokens, each with the number of the cut before it.
        blocks: Those over these tokens.
        apart: Whether tokens that leave keep their own values in the stream: where a graph holds a
            single block, or only MLPs, and may serve all blocks, what is merged would be merged
            from the first block on; where images are packed, into a token of another image.
    """

    method: HiPrune
    layout: RowLayout
    fixed: tuple[int, ...]
    shape: tuple[int, ...]
    cuts: Sequence[Cut]
    regions: Sequence[tuple[Region, int]]
    blocks: Sequence[Block]
    apart: bool

    @property
    def cut_count(self) -> int:
        return len(self.cuts)

    @property
    def packed(self) -> bool:
        """Whether patches of several images lie end to end, and share the budget."""
        return is_packed(self.layout.tokens)

    @property
    def patches(self) -> int:
        """Patch tokens of an image."""
        return self.layout.count - len(self.fixed)

    def count(self, version: int) -> int:
        """Patch tokens after a cut; all of them for 0."""
        return self.cuts[version - 1].count if version else self.patches
