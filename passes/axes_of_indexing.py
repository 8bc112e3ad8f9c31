"""Axis rules of look-ups by index."""

from __future__ import annotations

import torch
from torch import fx

from tokenpass.axis_rule import Rule, RuleContext, broadcast, join, position, right_aligned
from tokenpass.dims import Kind, axes_of, same, size_of
from tokenpass.facts import Effect, What
from tokenpass.graph import arguments, operands, shape_of, tensor_of

aten = torch.ops.aten


def _embedding(ctx: RuleContext, node: fx.Node) -> Effect:
    table, index = (ctx.dims(source) for source in operands(node))
    outs = (*index, *table[1:])
    return Effect(What.INDEX, (outs,), (table, index), axes_of(table[:1]))


def _index_select(ctx: RuleContext, node: fx.Node) -> Effect:
    x, index = (ctx.dims(source) for source in operands(node))
    place = position(arguments(node)["dim"], len(x))
    outs = (*x[:place], *(index or ((),)), *x[place + 1 :])
    return Effect(What.INDEX, (outs,), (x, index), axes_of([x[place]]))


def _index(ctx: RuleContext, node: fx.Node) -> Effect:
    """Advanced indexing by integer tensors in neighbouring dimensions."""
    given = arguments(node)["indices"]
    places = [place for place, index in enumerate(given) if index is not None]
    tensors = [given[place] for place in places]
    if places != list(range(places[0], places[-1] + 1)):
        return ctx.opaque(node, "advanced indexing of dimensions that are apart")
    if any(tensor_of(index).dtype == torch.bool for index in tensors):
        return ctx.opaque(node, "indexing by a mask")
    x = ctx.dims(operands(node)[0])
    index_dims = [ctx.dims(index) for index in tensors]
    rank = max(len(dims) for dims in index_dims)
    frame, mixed = broadcast(index_dims, rank)
    outs = (*x[: places[0]], *frame, *x[places[-1] + 1 :])
    seen = (x, *(right_aligned(frame, len(dims)) for dims in index_dims))
    looked_up = axes_of(x[places[0] : places[-1] + 1])
    return Effect(What.INDEX, (outs,), seen, mixed | looked_up)


def _gather(ctx: RuleContext, node: fx.Node) -> Effect:
    x, index = (ctx.dims(source) for source in operands(node))
    gathered = position(arguments(node)["dim"], len(x))
    outs, seen = list(index), list(x)
    mixed = axes_of([x[gathered]])
    for place, (dim, other) in enumerate(zip(x, index, strict=True)):
        if place == gathered:
            continue
        if same(size_of(dim), size_of(other)):
            outs[place], lost = join([dim, other])
            seen[place] = outs[place]
            mixed |= lost
        else:
            mixed |= axes_of([dim])
    return Effect(What.INDEX, (tuple(outs),), (tuple(seen), tuple(outs)), mixed)


def _scatter_add(ctx: RuleContext, node: fx.Node) -> Effect:
    """Sums of rows: along the other dimensions each position is for itself."""
    x, index, source = (ctx.dims(operand) for operand in operands(node))
    summed = position(arguments(node)["dim"], len(x))
    outs, seen = list(x), list(source)
    mixed = axes_of([x[summed], source[summed]])
    for place, (dim, other, chosen) in enumerate(zip(x, source, index, strict=True)):
        sizes = [size_of(d) for d in ((other,) if place == summed else (dim, other))]
        if not all(same(size, size_of(chosen)) for size in sizes):
            return ctx.opaque(node, "sums of some positions only")
        if place == summed:
            outs[place] = ctx.fresh(Kind.OPAQUE, size_of(dim), node, data=True)
            seen[place], lost = join([other, chosen])
        else:
            outs[place], lost = join([dim, other, chosen])
            seen[place] = outs[place]
        mixed |= lost
    told = tuple(seen)
    return Effect(What.INDEX, (tuple(outs),), (tuple(outs), told, told), mixed)


def _one_hot(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    classes = shape_of(tensor_of(node))[-1]
    outs = (*ctx.dims(source), ctx.fresh(Kind.CONSTANT, classes, node, data=False))
    return Effect(What.POINTWISE, (outs,), (ctx.dims(source),))


RULES: dict[object, Rule] = {
    aten.embedding: _embedding,
    aten.index_select: _index_select,
    aten.index: _index,
    aten.gather: _gather,
    aten.scatter_add: _scatter_add,
    aten.one_hot: _one_hot,
}
