"""The plan of a pruning: which cuts, scored where, how many tokens stay. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from tokenpass.blocks import Attention, Found
from tokenpass.dims import Dim, Dims, Size, axes_of
from tokenpass.grid import Grid
from tokenpass.methods import HiPrune


@dataclass(frozen=True)
class Stage:
    """One cut.

    Attributes:
        number: From 1.
        block: The block after which tokens leave, counted from 1; where the output is cut, the
            block whose attention ranks them.
        attention: The attention that ranks the tokens.
        at: The node whose value is cut; ``None`` where only outputs are.
        count: Patch tokens that stay.
    """

    number: int
    block: int
    attention: Attention
    at: fx.Node | None
    count: Size


@dataclass(frozen=True)
class Pruning:
    """All cuts of a graph.

    Attributes:
        method: What was asked for.
        found: What the patterns found; ``found.grid`` is not ``None``.
        grid: The patch tokens.
        batch: Factors of the batch.
        anchors: The attention in which anchors are sought, and its block.
        stages: The cuts, in order.
        steady: Whether tokens keep their places from frame to frame (:mod:`tokenpass.held`).
    """

    method: HiPrune
    found: Found
    grid: Grid
    batch: Dim
    anchors: Attention
    anchor_block: int
    stages: tuple[Stage, ...]
    steady: bool = False

    def count(self, version: int) -> Size:
        """Patch tokens in a version: all of them in 0, those that a stage leaves, none after."""
        if version == 0:
            return self.grid.count
        if version <= len(self.stages):
            return self.stages[version - 1].count
        return self.grid.count * 0

    def carried_in(self, outs: Sequence[Dims]) -> bool:
        """Whether a value has patch tokens for each image, some of which can leave.

        What all images share is a table: every image takes the rows of its own tokens.
        """
        images = axes_of([self.batch])
        return any(
            self.grid.carried_in(dims) and (not images or axes_of(dims) & images) for dims in outs
        )

    @property
    def cut_count(self) -> int:
        return len(self.stages)

    @property
    def inside(self) -> bool:
        """Whether tokens leave inside the encoder, and not only its outputs."""
        return self.stages[0].at is not None

    @property
    def prefix_only(self) -> int:
        """The version that holds no patch tokens: for what only prefix tokens are read from."""
        return len(self.stages) + 1
