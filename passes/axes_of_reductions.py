"""Axis rules of norms, softmax and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tokenpass.axis_rule import Rule, RuleContext, position
from tokenpass.dims import Dims, axes_of
from tokenpass.facts import Effect, What
from tokenpass.graph import arguments, operands, values_of
from tokenpass.passes.axes_of_arithmetic import pointwise

aten = torch.ops.aten


def _layer_norm(ctx: RuleContext, node: fx.Node) -> Effect:
    x, *affine = (ctx.dims(source) for source in operands(node))
    count = len(arguments(node)["normalized_shape"])
    inside = x[len(x) - count :]
    return Effect(What.NORM, (x,), (x, *(inside for _ in affine)), axes_of(inside))


def _group_norm(ctx: RuleContext, node: fx.Node) -> Effect:
    x, *affine = (ctx.dims(source) for source in operands(node))
    return Effect(What.NORM, (x,), (x, *((x[1],) for _ in affine)), axes_of(x[1:]))


def _batch_norm(ctx: RuleContext, node: fx.Node) -> Effect:
    x, *vectors = (ctx.dims(source) for source in operands(node))
    training = arguments(node).get("training", False)
    mixed = axes_of((x[0], *x[2:])) if training else frozenset()
    channel = (x[1],)
    what = What.NORM if training else What.POINTWISE
    return Effect(what, (x,), (x, *(channel for _ in vectors)), mixed)


def _instance_norm(ctx: RuleContext, node: fx.Node) -> Effect:
    x, *vectors = (ctx.dims(source) for source in operands(node))
    return Effect(What.NORM, (x,), (x, *((x[1],) for _ in vectors)), axes_of(x[2:]))


def _softmax(ctx: RuleContext, node: fx.Node) -> Effect:
    (x,) = (ctx.dims(source) for source in operands(node))
    place = position(arguments(node)["dim"], len(x))
    return Effect(What.SOFTMAX, (x,), (x,), axes_of([x[place]]))


def _scan(ctx: RuleContext, node: fx.Node) -> Effect:
    (x,) = (ctx.dims(source) for source in operands(node))
    place = position(arguments(node)["dim"], len(x))
    return Effect(What.MIX, (x,), (x,), axes_of([x[place]]))


def _reduced(node: fx.Node, x: Dims) -> set[int]:
    dim: Any = arguments(node).get("dim")
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return set(range(len(x)))
    wanted = dim if isinstance(dim, Sequence) else [dim]
    return {position(index, len(x)) for index in wanted}


def _reduction(what: What) -> Rule:
    def rule(ctx: RuleContext, node: fx.Node) -> Effect:
        if len(operands(node)) > 1:  # max(a, b) shares its name with max(a)
            return pointwise(ctx, node)
        (x,) = (ctx.dims(source) for source in operands(node))
        gone = _reduced(node, x)
        keep = arguments(node).get("keepdim", False)
        after = tuple(
            () if index in gone else dim for index, dim in enumerate(x) if keep or index not in gone
        )
        mixed = axes_of(x[index] for index in gone)
        return Effect(what, tuple(after for _ in values_of(node)), (x,), mixed)

    return rule


_reduce, _average = _reduction(What.REDUCE), _reduction(What.AVERAGE)

RULES: dict[object, Rule] = {
    aten.layer_norm: _layer_norm,
    aten.rms_norm: _layer_norm,
    aten.group_norm: _group_norm,
    aten.batch_norm: _batch_norm,
    aten.instance_norm: _instance_norm,
    aten.softmax: _softmax,
    aten._softmax: _softmax,
    aten.log_softmax: _softmax,
    aten._log_softmax: _softmax,
    aten.cumsum: _scan,
    aten.cumprod: _scan,
    aten.mean: _average,
    aten.amax: _average,
    aten.amin: _average,
    aten.sum: _reduce,
    aten.prod: _reduce,
    aten.max: _reduce,
    aten.min: _reduce,
    aten.var: _reduce,
    aten.std: _reduce,
    aten.var_mean: _reduce,
    aten.std_mean: _reduce,
    aten.logsumexp: _reduce,
    aten.linalg_vector_norm: _reduce,
    aten.norm: _reduce,
    aten.argmax: _reduce,
    aten.argmin: _reduce,
    aten.any: _reduce,
    aten.all: _reduce,
    aten.count_nonzero: _reduce,
}
