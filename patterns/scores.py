"""Attention scores: from the softmax back to the product of queries and keys.

Followed are scalings, added masks and biases, casts, reshapes and transpositions. Anything else
that keeps queries and keys apart (a boolean fill, a learned scale for each head, talking heads) is
followed too, but then the scores are not *plain*: they cannot be recomputed from queries, keys,
scale and masks alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx

from tokenpass import reasons
from tokenpass.blocks import Mask, NoMatch
from tokenpass.dims import Dim, Dims, Factor, is_data
from tokenpass.facts import Facts, What
from tokenpass.graph import arguments, operands

aten = torch.ops.aten

PATTERN = "attention scores"

CASTS = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default)


@dataclass(frozen=True)
class Scores:
    query: fx.Node
    key: fx.Node
    channel: tuple[int, int]
    scale: float
    masks: tuple[Mask, ...]
    query_dim: Dim
    plain: bool


@dataclass
class _Walk:
    """Where the walk stands, and what it has found so far.

    The dimension of the keys is followed by its outermost factor: ``ordinal`` says which of the
    equal factors of a node it is, counted in row-major order, since queries and keys of
    self-attention run along the same axis.
    """

    node: fx.Node
    factor: Factor
    ordinal: int
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)
    plain: bool = True

    def place(self, dims: Dims) -> int:
        """The dimension that holds the keys."""
        return place_of(dims, self.factor, self.ordinal)


def trace_scores(facts: Facts, softmax: fx.Node, place: int, value: fx.Node) -> Scores | NoMatch:
    """Find queries and keys of the attention whose softmax runs along dimension ``place``."""
    dims = facts.dims(softmax)
    if not dims[place]:
        return NoMatch(PATTERN, reasons.SINGLE_KEY, (softmax,))
    factor = dims[place][0]
    walk = _Walk(operands(softmax)[0], factor, count_of(dims[:place], factor))
    return _followed(facts, walk, softmax, value)


def _followed(facts: Facts, walk: _Walk, softmax: fx.Node, value: fx.Node) -> Scores | NoMatch:
    """Go back to the product of queries and keys.

    A bias may be computed from the queries, too, so that it looks like the scores: where a way ends
    nowhere, the other operand is tried.
    """
    while True:
        effect = facts.effects[walk.node]
        if effect.what is What.CONTRACT:
            found = _product(facts, walk, value)
            if isinstance(found, NoMatch):
                return NoMatch(PATTERN, found.reason, (softmax, *found.nodes))
            if found is not None:
                return found
        elif effect.what is What.POINTWISE:
            ways = _through_pointwise(facts, walk)
            if not ways:
                return NoMatch(PATTERN, reasons.NO_CARRIER, (walk.node, softmax))
            if len(ways) > 1:
                first = _followed(facts, ways[0], softmax, value)
                return first or _followed(facts, ways[1], softmax, value) or first
            (walk,) = ways
        elif effect.what is What.VIEW and len(operands(walk.node)) == 1:
            if not _through_view(facts, walk):
                return NoMatch(PATTERN, reasons.HIDDEN_KEYS, (walk.node, softmax))
        else:
            return NoMatch(PATTERN, reasons.NO_PRODUCT, (softmax, walk.node))


def count_of(dims: Dims, factor: Factor) -> int:
    return sum(dim.count(factor) for dim in dims)


def place_of(dims: Dims, factor: Factor, ordinal: int) -> int:
    """The dimension that holds one of several equal factors, counted in row-major order."""
    seen = -1
    for index, dim in enumerate(dims):
        seen += dim.count(factor)
        if seen >= ordinal:
            return index
    raise AssertionError("the axis was lost on the way")


def _product(facts: Facts, walk: _Walk, value: fx.Node) -> Scores | NoMatch | None:
    """Queries and keys if the product is theirs; ``None`` after a step over talking heads."""
    node = walk.node
    if node.target not in PRODUCTS:
        return _projected(facts, walk, value)
    left, right = operands(node)[-2:]
    rank, place = len(facts.dims(node)), walk.place(facts.dims(node))
    key, query = (right, left) if place == rank - 1 else (left, right)
    learned = not _is_data(facts.dims(query))
    if learned and _data_rank(facts, key) > _data_rank(facts, value):
        walk.plain = False
        walk.node = key
        return None
    if node.target is aten.baddbmm.default:
        _added_in_product(walk, place)
    query_place = rank - 2 if place == rank - 1 else rank - 1
    query_dim = facts.dims(node)[query_place] if rank > 1 else ()
    inner = {left: len(facts.dims(left)) - 1, right: max(0, len(facts.dims(right)) - 2)}
    channel = (inner[query], inner[key])
    masks = tuple(walk.masks)
    return Scores(query, key, channel, walk.scale, masks, query_dim, walk.plain)


def _projected(facts: Facts, walk: _Walk, value: fx.Node) -> NoMatch | None:
    """Step over heads that are mixed by a linear layer or a 1x1 convolution.

    Such a layer keeps the order of all other dimensions, so the keys stay the same in number.
    """
    node = walk.node
    data = [source for source in operands(node) if _is_data(facts.dims(source))]
    times = count_of(facts.dims(node), walk.factor)
    if len(data) == 1 and count_of(facts.dims(data[0]), walk.factor) == times:
        keeps = walk.factor.axis not in facts.effects[node].mixed
        if keeps and _data_rank(facts, data[0]) > _data_rank(facts, value):
            walk.plain = False
            walk.node = data[0]
            return None
    return NoMatch(PATTERN, reasons.PROJECTED, (node,))


def _added_in_product(walk: _Walk, place: int) -> None:
    given = arguments(walk.node)
    if given["beta"] == 1:
        walk.plain &= walk.scale == 1.0
        walk.masks.append(Mask(given["self"], walk.node, place))
    elif given["beta"] != 0:
        walk.plain = False
    walk.scale *= float(given["alpha"])


def _through_pointwise(facts: Facts, walk: _Walk) -> list[_Walk]:
    """Where the walk may go on, the likeliest way first: either operand of a sum may be scores."""
    node, dims = walk.node, facts.dims(walk.node)
    times = count_of(dims, walk.factor)
    carrying = [o for o in operands(node) if count_of(facts.dims(o), walk.factor) == times]
    carrying.sort(key=lambda source: _data_rank(facts, source), reverse=True)
    is_sum = node.target is aten.add.Tensor and len(operands(node)) == 2
    return [_through(facts, walk, scores) for scores in carrying[: 2 if is_sum else 1]]


def _through(facts: Facts, walk: _Walk, scores: fx.Node) -> _Walk:
    """The walk, one elementwise operation further back, if ``scores`` are the scores."""
    node, dims = walk.node, facts.dims(walk.node)
    on = replace(walk, node=scores, masks=list(walk.masks))
    others = [source for source in operands(node) if source is not scores]
    given = arguments(node)
    if node.target is aten.mul.Tensor and not others:
        on.scale *= _number(given["other"])
    elif node.target is aten.div.Tensor and not others:
        on.scale /= _number(given["other"])
    elif node.target is aten.add.Tensor and len(others) == 1 and given["alpha"] == 1:
        on.plain &= walk.scale == 1.0
        on.masks.append(Mask(others[0], node, walk.place(dims)))
    elif node.target not in CASTS:
        on.plain = False
    return on


def _number(value: object) -> float:
    """A factor given as a number; NaN where it is computed, which no plain scale survives."""
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _through_view(facts: Facts, walk: _Walk) -> bool:
    """Step over a view. A reshape keeps the row-major order of factors, a permutation does not."""
    node = walk.node
    (source,) = operands(node)
    before, after = facts.dims(source), facts.dims(node)
    if count_of(before, walk.factor) != count_of(after, walk.factor):
        return False
    if node.target is aten.permute.default:
        place = walk.place(after)
        within = walk.ordinal - count_of(after[:place], walk.factor)
        origin = arguments(node)["dims"][place] % len(before)
        walk.ordinal = count_of(before[:origin], walk.factor) + within
    walk.node = source
    return True


def _is_data(dims: Dims) -> bool:
    return any(is_data(dim) for dim in dims)


def _data_rank(facts: Facts, node: fx.Node) -> int:
    """How many factors of a node's dimensions come from the input: scores have most."""
    return sum(factor.axis.data for dim in facts.dims(node) for factor in dim)
