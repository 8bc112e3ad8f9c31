"""Axis rules of operations that only move elements about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from tokenpass.axis_rule import Rule, RuleContext, number, out_shape, position, right_aligned
from tokenpass.dims import (
    Dims,
    Kind,
    axes_of,
    is_data,
    regroup,
    size_of,
)
from tokenpass.facts import Effect, Literal, What
from tokenpass.graph import arguments, operands

aten = torch.ops.aten


def _reshape(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    before, shape = ctx.dims(source), out_shape(node)
    found, lost = regroup(before, shape)
    outs = tuple(
        ctx.fresh(Kind.OPAQUE, size, node, data=any(axis.data for axis in lost))
        if dim is None
        else dim
        for dim, size in zip(found, shape, strict=True)
    )
    name = "size" if "size" in arguments(node) else "shape"
    literals = (Literal(name, outs),)
    return Effect(What.VIEW, (outs,), (before,), frozenset(lost), literals=literals)


def _permute(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    before = ctx.dims(source)
    order = [position(index, len(before)) for index in arguments(node)["dims"]]
    return Effect(What.VIEW, (tuple(before[index] for index in order),), (before,))


def _transpose(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    before = ctx.dims(source)
    given = arguments(node)
    first, second = (position(given[name], len(before)) for name in ("dim0", "dim1"))
    after = list(before)
    after[first], after[second] = after[second], after[first]
    return Effect(What.VIEW, (tuple(after),), (before,))


def _unsqueeze(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    before = ctx.dims(source)
    place = position(arguments(node)["dim"], len(before) + 1)
    return Effect(What.VIEW, ((*before[:place], (), *before[place:]),), (before,))


def _squeeze(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    before = ctx.dims(source)
    dim = arguments(node).get("dim")
    wanted = range(len(before)) if dim is None else dim if isinstance(dim, Sequence) else [dim]
    gone = {position(index, len(before)) for index in wanted}
    after = tuple(d for i, d in enumerate(before) if d or i not in gone)
    return Effect(What.VIEW, (after,), (before,))


def _expand(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    before, shape = ctx.dims(source), out_shape(node)
    padded = ((),) * (len(shape) - len(before)) + before
    outs = tuple(
        dim or ctx.fresh(Kind.CONSTANT, size, node, data=False)
        for dim, size in zip(padded, shape, strict=True)
    )
    literals = (Literal("size", outs),)
    return Effect(What.VIEW, (outs,), (right_aligned(outs, len(before)),), literals=literals)


def _identity(ctx: RuleContext, node: fx.Node) -> Effect:
    first, *others = operands(node)
    dims = ctx.dims(first)
    seen = (dims, *(ctx.dims(other) for other in others))
    return Effect(What.POINTWISE, (dims,), seen)


def _roll(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    before, given = ctx.dims(source), arguments(node)
    if not given["dims"]:
        return ctx.opaque(node, "roll of the flattened tensor")
    after = list(before)
    for shift, index in zip(given["shifts"], given["dims"], strict=True):
        place = position(index, len(before))
        after[place] = ctx.table.roll(after[place], number(shift), node)
    moved = axes_of(a for a, b in zip(before, after, strict=True) if a != b)
    return Effect(What.MIX, (tuple(after),), (before,), moved)


def _view_as_complex(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    before = ctx.dims(source)
    return Effect(What.VIEW, (before[:-1],), (before,), axes_of(before[-1:]))


def _view_as_real(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    before = ctx.dims(source)
    pair = ctx.fresh(Kind.CONSTANT, out_shape(node)[-1], node, data=False)
    return Effect(What.VIEW, ((*before, pair),), (before,))


def _flip(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)
    before = ctx.dims(source)
    turned = {position(index, len(before)) for index in arguments(node)["dims"]}
    after = tuple(
        ctx.fresh(Kind.OPAQUE, size_of(dim), node, data=is_data(dim)) if index in turned else dim
        for index, dim in enumerate(before)
    )
    return Effect(What.MIX, (after,), (before,), axes_of(before[index] for index in turned))


def _unfold(ctx: RuleContext, node: fx.Node) -> Effect:
    """``Tensor.unfold``: windows of one dimension; the window becomes the last dimension."""
    (source,) = operands(node)
    before, shape = ctx.dims(source), out_shape(node)
    place = position(arguments(node)["dimension"], len(before))
    dim = before[place]
    windows = ctx.fresh(Kind.SPATIAL, shape[place], node, data=is_data(dim))
    inside = ctx.fresh(Kind.OPAQUE, shape[-1], node, data=is_data(dim))
    outs: Dims = (*before[:place], windows, *before[place + 1 :], inside)
    return Effect(What.MIX, (outs,), (before,), axes_of([dim]))


RULES: dict[object, Rule] = {
    aten.reshape: _reshape,
    aten.view: _reshape,
    aten._unsafe_view: _reshape,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.expand: _expand,
    aten.roll: _roll,
    aten.unfold: _unfold,
    aten.flip: _flip,
    aten.view_as_complex: _view_as_complex,
    aten.view_as_real: _view_as_real,
    aten.alias: _identity,
    aten.clone: _identity,
    aten.contiguous: _identity,
    aten.detach: _identity,
    aten.lift_fresh_copy: _identity,
    aten.lift_fresh: _identity,
    aten.to: _identity,
    aten._to_copy: _identity,
    aten.type_as: _identity,
    aten.dropout: _identity,
    aten.alpha_dropout: _identity,
    aten.zeros_like: _identity,
    aten.ones_like: _identity,
    aten.full_like: _identity,
    aten.empty_like: _identity,
    aten.rand_like: _identity,
    aten.randn_like: _identity,
    aten.bernoulli: _identity,
}
