"""Axis rules of elementwise operations, products and attention."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from tokenpass.axis_rule import (
    Rule,
    RuleContext,
    broadcast,
    join,
    out_shape,
    position,
    right_aligned,
)
from tokenpass.dims import Axis, Dim, Dims, Kind, axes_of, size_of
from tokenpass.facts import Effect, What, Work
from tokenpass.graph import arguments, operands

aten = torch.ops.aten


def pointwise(ctx: RuleContext, node: fx.Node) -> Effect:
    """Any operation that computes each element of its result from elements in the same place."""
    sources = [ctx.dims(source) for source in operands(node)]
    outs, mixed = broadcast(sources, len(out_shape(node)))
    return Effect(What.POINTWISE, (outs,), tuple(outs for _ in sources), mixed)


def _linear(ctx: RuleContext, node: fx.Node) -> Effect:
    x, weight, *bias = (ctx.dims(source) for source in operands(node))
    inner, lost = join([x[-1], weight[-1]])
    features = weight[:-1]
    outs = (*x[:-1], *features)
    seen = ((*x[:-1], inner), (*features, inner), *(features for _ in bias))
    work = Work(outs, (inner,))
    return Effect(What.CONTRACT, (outs,), seen, _summed(inner, lost), (work,))


def _summed(inner: Dim, lost: frozenset[Axis]) -> frozenset[Axis]:
    return axes_of([inner]) | lost


def _product(left: Dims, right: Dims) -> Effect:
    """``left @ right`` with the broadcasting of ``torch.matmul``."""
    rows = left[-2:-1] if len(left) > 1 else ()
    columns = right[-1:] if len(right) > 1 else ()
    right_inner = right[-2] if len(right) > 1 else right[-1]
    inner, lost = join([left[-1], right_inner])
    batches = (left[:-2], right[:-2])
    batch, mixed = broadcast(batches, max(map(len, batches)))
    outs = (*batch, *rows, *columns)
    seen_left = (*right_aligned(batch, len(left[:-2])), *rows, inner)
    seen_right = (*right_aligned(batch, len(right[:-2])), inner, *columns)
    work = Work(outs, (inner,))
    mixed |= _summed(inner, lost)
    return Effect(What.CONTRACT, (outs,), (seen_left, seen_right), mixed, (work,))


def _matmul(ctx: RuleContext, node: fx.Node) -> Effect:
    left, right = (ctx.dims(source) for source in operands(node))
    return _product(left, right)


def _addmm(ctx: RuleContext, node: fx.Node) -> Effect:
    """``addmm`` and ``baddbmm``: the first operand is added to the product of the others."""
    added, left, right = (ctx.dims(source) for source in operands(node))
    effect = _product(left, right)
    (frame,) = effect.outs
    outs, mixed = broadcast([frame, added], len(frame))
    seen = (outs, *effect.seen)
    return Effect(What.CONTRACT, (outs,), seen, effect.mixed | mixed, effect.work)


def _attention(ctx: RuleContext, node: fx.Node) -> Effect:
    given = arguments(node)
    query, key, value = (ctx.dims(given[name]) for name in ("query", "key", "value"))
    mask = given["attn_mask"]
    if mask is not None and not isinstance(mask, fx.Node):
        return ctx.opaque(node, f"attention mask of type {type(mask).__name__}")
    grouped = given.get("enable_gqa", False)
    heads = (query[:-2],) if grouped else (query[:-2], key[:-2], value[:-2])
    batch, mixed = broadcast(heads, len(query) - 2)
    keys, lost = join([key[-2], value[-2]])
    inner, lost_inner = join([query[-1], key[-1]])
    outs = (*batch, query[-2], value[-1])
    lead = (key[:-2], value[:-2]) if grouped else (batch, batch)
    seen: tuple[Dims, ...] = (
        (*batch, query[-2], inner),
        (*lead[0], keys, inner),
        (*lead[1], keys, value[-1]),
    )
    if mask is not None:
        seen = (*seen, (*batch, query[-2], keys))
    rows = (*batch, query[-2])
    work = (Work(rows, (keys, inner)), Work((*rows, value[-1]), (keys,)))
    mixed |= axes_of([keys, inner]) | lost | lost_inner
    return Effect(What.ATTENTION, (outs,), seen, mixed, work)


def _constant_like(ctx: RuleContext, node: fx.Node) -> Effect:
    """``new_ones`` and its kin take dtype and device from an operand, and nothing else."""
    outs = ctx.fresh_dims(Kind.CONSTANT, out_shape(node), node, data=False)
    return Effect(What.SOURCE, (outs,), tuple(ctx.dims(source) for source in operands(node)))


def _prelu(ctx: RuleContext, node: fx.Node) -> Effect:
    x, slope = (ctx.dims(source) for source in operands(node))
    channel = (x[1],) if len(x) > 1 and slope != ((),) else slope
    return Effect(What.POINTWISE, (x,), (x, channel))


def _glu(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    x = ctx.dims(source)
    place = position(arguments(node)["dim"], len(x))
    half = ctx.table.slice(x[place], sympy.Integer(0), size_of(x[place]) / 2, node)
    outs = (*x[:place], half, *x[place + 1 :])
    return Effect(What.POINTWISE, (outs,), (x,), axes_of([x[place]]))


def _outer(ctx: RuleContext, node: fx.Node) -> Effect:
    left, right = (ctx.dims(source) for source in operands(node))
    return Effect(What.POINTWISE, ((*left, *right),), (left, right))


def _meshgrid(ctx: RuleContext, node: fx.Node) -> Effect:
    sources = [ctx.dims(source) for source in operands(node)]
    frame = tuple(dim for dims in sources for dim in (dims or ((),)))
    if arguments(node).get("indexing") == "xy" and len(frame) > 1:
        frame = (frame[1], frame[0], *frame[2:])
    outs = tuple(frame for _ in sources)
    return Effect(What.VIEW, outs, tuple(sources))


RULES: dict[object, Rule] = {
    aten.copy: pointwise,
    aten.masked_fill: pointwise,
    aten.rsub: pointwise,
    aten.copy_: pointwise,
    aten.fill_: pointwise,
    aten.floor_divide: pointwise,
    aten.hardswish: pointwise,
    aten.hardswish_: pointwise,
    aten.log_sigmoid: pointwise,
    aten.special_expm1: pointwise,
    aten.__and__: pointwise,
    aten.__or__: pointwise,
    aten.__xor__: pointwise,
    aten.complex: pointwise,
    aten.polar: pointwise,
    aten.real: pointwise,
    aten.imag: pointwise,
    aten.new_ones: _constant_like,
    aten.new_zeros: _constant_like,
    aten.new_full: _constant_like,
    aten.new_empty: _constant_like,
    aten.prelu: _prelu,
    aten.glu: _glu,
    aten.linear: _linear,
    aten.matmul: _matmul,
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.mv: _matmul,
    aten.dot: _matmul,
    aten.addmm: _addmm,
    aten.baddbmm: _addmm,
    aten.outer: _outer,
    aten.meshgrid: _meshgrid,
    aten.scaled_dot_product_attention: _attention,
}
