"""What the patterns find, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from tokenpass.dims import Dim
from tokenpass.graph import names, place
from tokenpass.grid import Grid


@dataclass(frozen=True)
class NoMatch:
    """Why a pattern does not apply.

    Attributes:
        pattern: The pattern that came nearest.
        reason: The condition that failed; see :mod:`tokenpass.reasons`.
        nodes: The nodes at fault, the first one first.
    """

    pattern: str
    reason: str
    nodes: tuple[fx.Node, ...]

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.pattern}: {self.reason} ({names(self.nodes)})"


@dataclass(frozen=True)
class Mask:
    """Something added to attention scores, or a boolean that excludes some of them.

    Attributes:
        node: The mask.
        reader: The node that applies it; the scores have its dimensions there.
        key_place: Which of these dimensions is that of the keys.
    """

    node: fx.Node
    reader: fx.Node
    key_place: int


@dataclass(frozen=True)
class Attention:
    """``softmax(q k^T * scale + bias) v``, however it is spelled.

    Attributes:
        query: Queries, keys and values as they enter the products.
        channel: The dimension of queries, and that of keys, that their product sums over.
        scale: Factor of the scores.
        masks: What is added to the scores, or excludes some of them.
        softmax: The node that normalises: a softmax, or the fused operator.
        out: The node that holds the result of the product with the values.
        query_dim: The dimension of the queries; ``key_dim`` that of keys and values.
        plain: Whether scores, masks and softmax can be recomputed from the above alone.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    channel: tuple[int, int]
    scale: float
    masks: tuple[Mask, ...]
    softmax: fx.Node
    out: fx.Node
    query_dim: Dim
    key_dim: Dim
    plain: bool

    @property
    def fused(self) -> bool:
        return self.softmax is self.out

    @property
    def place(self) -> str:
        return place(self.softmax)


@dataclass(frozen=True)
class Mlp:
    """Linear layers with a nonlinearity between them, token by token.

    Attributes:
        input: What the first linear layers read.
        linears: All linear layers, in execution order.
        gated: Whether two of them are multiplied, as in SwiGLU.
    """

    input: fx.Node
    linears: tuple[fx.Node, ...]
    gated: bool

    @property
    def out(self) -> fx.Node:
        return self.linears[-1]

    @property
    def place(self) -> str:
        return place(self.linears[0])


@dataclass(frozen=True)
class Norm:
    """A normalisation over channels.

    Attributes:
        input: What it reads.
        out: Its last node, affine part included.
    """

    input: fx.Node
    out: fx.Node


@dataclass(frozen=True)
class Residual:
    """``out = skip + branch``.

    Attributes:
        skip: The stream before.
        branch: What is added.
        out: The stream after.
        root: What the branch is computed from: the skip itself, the skip before a scaling, or the
            stream at the start of a block whose branches run side by side.
    """

    skip: fx.Node
    branch: fx.Node
    out: fx.Node
    root: fx.Node


@dataclass(frozen=True)
class PatchEmbedding:
    """Where the patch tokens begin.

    Attributes:
        out: The first node in which they lie along one dimension.
        makers: The nodes that made the positions (a strided convolution, say).
    """

    out: fx.Node
    makers: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Block:
    """Attention and MLP around the residual stream.

    Attributes:
        attentions: Usually one; several in a block with parallel attention; none where a graph
            break has cut it off.
        mlps: Usually one.
        residuals: The additions to the stream, in order; none where there is no stream.
    """

    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    residuals: tuple[Residual, ...]

    @property
    def attention(self) -> Attention:
        return self.attentions[0]

    @property
    def mlp(self) -> Mlp | None:
        return self.mlps[0] if self.mlps else None

    @property
    def first(self) -> fx.Node:
        """The result of the first attention; of the first MLP, if there is no attention."""
        return (self.attentions or self.mlps)[0].out

    @property
    def place(self) -> str:
        return (self.attentions or self.mlps)[0].place

    @property
    def out(self) -> fx.Node:
        """The stream after the block; what the attention computes, if it is added to nothing."""
        return self.residuals[-1].out if self.residuals else self.attention.out


@dataclass(frozen=True)
class Found:
    """All that the patterns found in one graph.

    Attributes:
        grid: The patch tokens; ``None`` where no attention runs over any.
        attentions: Every attention, whatever it runs over.
        over_grid: Those in which all patch tokens of an image attend to one another.
        misses: Attention and MLP that came near a pattern and failed, or lie outside the grid.
    """

    grid: Grid | None
    attentions: Sequence[Attention]
    over_grid: Sequence[Attention]
    mlps: Sequence[Mlp]
    norms: Sequence[Norm]
    residuals: Sequence[Residual]
    blocks: Sequence[Block]
    embedding: PatchEmbedding | None
    misses: Sequence[NoMatch]
