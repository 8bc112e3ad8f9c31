"""What the axis analysis knows of every node of a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import sympy
from torch import fx

from tokenpass.dims import ONE, ZERO, Axis, Dims, Size, size_of
from tokenpass.graph import operands


class What(Enum):
    """The sort of operation, as far as a token is concerned."""

    SOURCE = "makes a value"
    VIEW = "moves elements about"
    POINTWISE = "computes each element alone"
    NORM = "normalises along an axis"
    CONTRACT = "sums products along an axis"
    SOFTMAX = "softmax along an axis"
    ATTENTION = "fused attention"
    REDUCE = "reduces an axis"
    AVERAGE = "mean or maximum: a reduction that any number of tokens can go through"
    MIX = "convolution, pooling, resize, scan"
    INDEX = "takes elements by index"
    OPAQUE = "not understood"


@dataclass(frozen=True, slots=True)
class Literal:
    """An integer in a node's arguments that is a sum of sizes of dimensions.

    Attributes:
        argument: Name of the argument.
        dims: The dimensions whose sizes it is; their sum if ``total``, else one integer each.
        offset: Added to the sum.
    """

    argument: str
    dims: Dims
    total: bool = False
    offset: Size = ZERO

    def value(self, sizes: Sequence[Any], offset: Any) -> Any:
        """The argument where the dimensions have these sizes.

        Args:
            sizes: One for each of ``dims``.
            offset: The same number as :attr:`offset`, of the kind that the sizes are.
        """
        return sum(sizes, offset) if self.total else list(sizes)


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of a node: the product of the sizes of ``rows``, ``inner`` and ``times``.

    ``inner`` are the dimensions that are summed over, so a rewrite that computes fewer of a node's
    rows changes ``rows`` and one that computes with fewer terms changes ``inner``.
    """

    rows: Dims
    inner: Dims = ()
    times: Size = ONE


@dataclass(frozen=True, slots=True)
class Effect:
    """One node, in terms of axes.

    Attributes:
        what: The sort of operation.
        outs: Dimensions of each output tensor.
        seen: For each tensor operand, the dimensions of the computation that its own dimensions
            line up with; there may be more of them than it has, it lines up with the last ones.
            Where they differ from its own dimensions, a constant meets data: that is how a position
            table is known to run along the token axis.
        mixed: Axes along which positions influence one another.
        work: Multiply-adds, for the cost.
        literals: Arguments that depend on sizes.
        note: For an opaque operation, why.
    """

    what: What
    outs: tuple[Dims, ...]
    seen: tuple[Dims, ...] = ()
    mixed: frozenset[Axis] = frozenset()
    work: tuple[Work, ...] = ()
    literals: tuple[Literal, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """The effects of a graph's nodes."""

    graph: fx.Graph
    effects: dict[fx.Node, Effect] = field(default_factory=dict)

    def dims(self, node: fx.Node) -> Dims:
        """Dimensions of the tensor that ``node`` computes; of the first one, if it has several."""
        return self.effects[node].outs[0]

    def seen(self, node: fx.Node) -> Iterator[tuple[fx.Node, Dims]]:
        """Each operand of ``node`` with the dimensions it lines up with."""
        return zip(operands(node), self.effects[node].seen, strict=True)


def lined_up(own: Dims, seen: Dims) -> Dims:
    """The dimensions of a computation that an operand's own dimensions line up with, one each."""
    return seen[len(seen) - len(own) :]


def multiply_adds(work: tuple[Work, ...]) -> Size:
    return sympy.Add(
        *(sympy.Mul(w.times, *(size_of(dim) for dim in (*w.rows, *w.inner))) for w in work)
    )
