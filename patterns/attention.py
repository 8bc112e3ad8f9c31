"""Attention: ``softmax(q k^T * scale + bias) v``.

Matched by what is done along which axis, not by spelling: the fused operator; or a softmax along an
axis ``A`` whose result is multiplied with the values so that ``A`` is summed over. Between softmax
and product may stand anything that keeps ``A`` (casts, dropout, reshapes, talking heads). The
scores are followed back (:mod:`tokenpass.patterns.scores`) to the product of queries and keys.

Covered: ``scaled_dot_product_attention``; matmul, bmm, baddbmm and einsum; the scale on the
queries, the keys, the scores or in the weights; added and boolean masks; joint or separate
projections; multi-query and grouped keys; attention over windows, pooled keys, a class token or a
latent query. Not covered, and reported: causal attention, a softmax whose result is not summed
along its axis, attention without softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from tokenpass import reasons
from tokenpass.blocks import Attention, Mask, NoMatch
from tokenpass.dims import Dim, axes_of
from tokenpass.facts import Facts, What
from tokenpass.graph import arguments, operands, tensor_of
from tokenpass.patterns.scores import CASTS, PRODUCTS, count_of, place_of, trace_scores

aten = torch.ops.aten

PATTERN = "attention"

BETWEEN = (What.POINTWISE, What.VIEW, What.CONTRACT, What.NORM)
"""What may stand between the softmax and the product with the values."""


def find_attentions(facts: Facts) -> Iterator[Attention | NoMatch]:
    """Every attention of a graph, and every softmax that is none."""
    for node in facts.graph.nodes:
        what = facts.effects[node].what
        if what is What.ATTENTION:
            yield _fused(facts, node)
        elif what is What.SOFTMAX:
            yield _written_out(facts, node)


def _fused(facts: Facts, node: fx.Node) -> Attention | NoMatch:
    given = arguments(node)
    if given["is_causal"]:
        return NoMatch(PATTERN, reasons.CAUSAL, (node,))
    query, scale, mask = given["query"], given["scale"], given["attn_mask"]
    width = tensor_of(query).shape[-1]
    seen_key = facts.effects[node].seen[1]
    return Attention(
        query=query,
        key=given["key"],
        value=given["value"],
        channel=(len(facts.dims(query)) - 1, len(facts.dims(given["key"])) - 1),
        scale=1.0 / math.sqrt(float(width)) if scale is None else float(scale),
        masks=() if mask is None else (Mask(mask, node, len(facts.dims(query)) - 1),),
        softmax=node,
        out=node,
        query_dim=facts.dims(query)[-2],
        key_dim=seen_key[-2],
        plain=True,
    )


def _written_out(facts: Facts, node: fx.Node) -> Attention | NoMatch:
    place = arguments(node)["dim"] % len(facts.dims(node))
    axis = facts.dims(node)[place]
    product = _product_with_values(facts, node, axis)
    if isinstance(product, NoMatch):
        return product
    path, out, value = product
    if not _sums_over(facts, node, place, path, out):
        return NoMatch(PATTERN, reasons.OTHER_SUM, (node, out))
    scores = trace_scores(facts, node, place, value)
    if isinstance(scores, NoMatch):
        return scores
    straight = all(
        (facts.effects[step].what is What.VIEW or step.target in CASTS) and len(step.users) == 1
        for step in path
    )
    return Attention(
        query=scores.query,
        key=scores.key,
        value=value,
        channel=scores.channel,
        scale=scores.scale,
        masks=scores.masks,
        softmax=node,
        out=out,
        query_dim=scores.query_dim,
        key_dim=axis,
        plain=scores.plain and straight and len(node.users) == 1,
    )


def _product_with_values(
    facts: Facts, softmax: fx.Node, axis: Dim
) -> tuple[list[fx.Node], fx.Node, fx.Node] | NoMatch:
    """The product that sums the probabilities along ``axis``.

    Returns the nodes between, the product and the values.
    """
    dead_end = NoMatch(PATTERN, reasons.NO_SUM, (softmax,))
    paths: list[list[fx.Node]] = [[]]
    seen: set[fx.Node] = set()
    while paths:
        path = paths.pop()
        current = path[-1] if path else softmax
        users = [user for user in current.users if user.op != "output"]
        for user in users:
            effect = facts.effects[user]
            if effect.what is What.CONTRACT and axes_of([axis]) <= effect.mixed:
                others = [source for source in operands(user) if source is not current]
                if others:
                    return path, user, others[-1]
        carrying = [user for user in users if _keeps(facts, user, axis) and user not in seen]
        if not carrying and len(dead_end.nodes) == 1:
            dead_end = NoMatch(PATTERN, reasons.NO_SUM, (softmax, *users[:1]))
        seen.update(carrying)
        paths += [[*path, user] for user in reversed(carrying)]
    return dead_end


def _sums_over(
    facts: Facts, softmax: fx.Node, place: int, path: list[fx.Node], product: fx.Node
) -> bool:
    """Whether a product sums over the dimension that the softmax ran along.

    Queries and keys of self-attention run along the same axis, so its name alone does not say it.
    """
    dims = facts.dims(softmax)
    if not dims[place]:
        return True
    factor = dims[place][0]
    ordinal, times = count_of(dims[:place], factor), count_of(dims, factor)
    last = softmax
    for node in path:
        if facts.effects[node].what is What.CONTRACT or count_of(facts.dims(node), factor) != times:
            return True
        if node.target is aten.permute.default:
            before, after = facts.dims(last), facts.dims(node)
            origin = place_of(before, factor, ordinal)
            within = ordinal - count_of(before[:origin], factor)
            order = [index % len(before) for index in arguments(node)["dims"]]
            ordinal = count_of(after[: order.index(origin)], factor) + within
        last = node
    if product.target not in PRODUCTS:
        return True
    summed = len(facts.dims(last)) - (1 if operands(product)[-2] is last else 2)
    return place_of(facts.dims(last), factor, ordinal) == summed


def _keeps(facts: Facts, node: fx.Node, axis: Dim) -> bool:
    effect = facts.effects[node]
    return (
        effect.what in BETWEEN
        and not axes_of([axis]) & effect.mixed
        and any(_holds(dim, axis) for dims in effect.outs for dim in dims)
    )


def _holds(dim: Dim, axis: Dim) -> bool:
    """Whether ``axis`` is a run of the factors of ``dim``."""
    width = len(axis)
    return any(dim[start : start + width] == axis for start in range(len(dim) - width + 1))
