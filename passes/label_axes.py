"""Token-axis analysis: an abstract interpretation of the graph in terms of axes.

Every dimension of every value becomes a product of axes (:mod:`tokenpass.dims`). There is one rule
for each operation, in one table; an operation without a rule is *opaque*: its result has new axes
and it mixes everything, which is never wrong. A rule whose answer contradicts the shape of the
traced value is treated as opaque too.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from tokenpass.arrivals import Arrival, begin_with
from tokenpass.axis_rule import Rule, RuleContext, matches_shape
from tokenpass.dims import AxisTable, Kind
from tokenpass.facts import Effect, Facts, What
from tokenpass.graph import operands, shape_of, values_of
from tokenpass.passes import (
    axes_of_arithmetic,
    axes_of_indexing,
    axes_of_neighbours,
    axes_of_reductions,
    axes_of_slices,
    axes_of_views,
)

AXIS_RULES: dict[object, Rule] = {
    **axes_of_views.RULES,
    **axes_of_slices.RULES,
    **axes_of_arithmetic.RULES,
    **axes_of_reductions.RULES,
    **axes_of_neighbours.RULES,
    **axes_of_indexing.RULES,
}


def label_axes(
    graph: fx.Graph,
    constants: frozenset[fx.Node],
    arrivals: Mapping[fx.Node, Arrival] | None = None,
) -> Facts:
    """Label every dimension in ``graph``.

    Args:
        graph: A canonical ATen graph with ``val`` metadata on its nodes.
        constants: The placeholders that are parameters or buffers.
        arrivals: What is known of placeholders that another graph handed over.
    """
    facts = Facts(graph)
    table = AxisTable()
    context = RuleContext(facts.effects, table)
    for node in graph.nodes:
        effect = _effect(context, node, constants)
        if arrivals and node in arrivals:
            known = begin_with(arrivals[node], effect.outs[0])
            table.learn(known)
            effect = replace(effect, outs=(known,))
        facts.effects[node] = effect
    return facts


def _effect(context: RuleContext, node: fx.Node, constants: frozenset[fx.Node]) -> Effect:
    if node.op in ("placeholder", "get_attr"):
        data = node.op == "placeholder" and node not in constants
        kind = Kind.INPUT if data else Kind.CONSTANT
        outs = tuple(
            context.fresh_dims(kind, shape_of(value), node, data=data) for value in values_of(node)
        )
        return Effect(What.SOURCE, outs)
    if node.op == "output" or not values_of(node):
        seen = tuple(context.dims(source) for source in operands(node))
        return Effect(What.SOURCE, (), seen)
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        item = context.outs(source)[index]  # type: ignore[index]
        return Effect(What.VIEW, (item,), (item,))
    if not operands(node):
        made = [shape_of(value) for value in values_of(node)]
        outs = tuple(context.fresh_dims(Kind.CONSTANT, s, node, data=False) for s in made)
        return Effect(What.SOURCE, outs)
    return _checked(context, node)


def _checked(context: RuleContext, node: fx.Node) -> Effect:
    rule = _rule(node)
    if rule is None:
        return context.opaque(node, f"no axis rule for {node.target}")
    effect = rule(context, node)
    shapes = [shape_of(value) for value in values_of(node)]
    agree = len(effect.outs) == len(shapes) and all(
        matches_shape(dims, shape) for dims, shape in zip(effect.outs, shapes, strict=True)
    )
    return effect if agree else context.opaque(node, f"axis rule of {node.target} does not fit")


def _rule(node: fx.Node) -> Rule | None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    rule = AXIS_RULES.get(target.overloadpacket)
    if rule is None and torch.Tag.pointwise in target.tags:
        return axes_of_arithmetic.pointwise
    return rule
