"""MLP: linear layers with a nonlinearity between them, each token alone.

Matched backwards from a linear layer: everything between it and the linear layers before it is
elementwise, and something in between is not linear. Covered: two or three linear layers, linear
layers spelled as matmul or as 1x1 convolution, gated forms (SwiGLU, GEGLU), any activation, norms
inside. Not covered: a convolution between the layers, mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from tokenpass import reasons
from tokenpass.blocks import Mlp, NoMatch
from tokenpass.dims import is_data
from tokenpass.facts import Facts, What
from tokenpass.graph import operands
from tokenpass.grid import Tokens

aten = torch.ops.aten

PATTERN = "mlp"

LINEAR_STEPS = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.dropout.default,
)
"""Elementwise operators that make no nonlinearity by themselves."""


CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def find_mlps(facts: Facts, tokens: Tokens, stream: frozenset[fx.Node]) -> Iterator[Mlp | NoMatch]:
    """MLPs over patch tokens and over what is pooled from them, in order.

    Args:
        facts: Of the graph.
        tokens: Which ones count.
        stream: Residual additions: no MLP reaches across one.
    """
    found: dict[fx.Node, Mlp] = {}
    misses: list[NoMatch] = []
    order = {node: place for place, node in enumerate(facts.effects)}
    for node in facts.graph.nodes:
        if not is_linear(facts, tokens, node):
            continue
        match = _match(facts, tokens, node, stream, order)
        if match is None:
            continue
        if isinstance(match, NoMatch):
            misses.append(match)
            continue
        inner = [found.pop(linear) for linear in match.linears if linear in found]
        found[node] = _chained(match, inner)
    yield from found.values()
    yield from misses


def is_linear(facts: Facts, tokens: Tokens, node: fx.Node) -> bool:
    """Whether ``node`` multiplies channels with a constant matrix, each token alone.

    A 1x1 convolution counts where its positions are the patch tokens, not in a convolutional stem.
    """
    effect = facts.effects[node]
    if effect.what is not What.CONTRACT:
        return False
    if node.target in CONVOLUTIONS and not tokens.carried_in(effect.outs[0]):
        return False
    data = _data_operands(facts, node)
    return len(data) == 1 and not any(tokens.touched_by(axis) for axis in effect.mixed)


def _match(
    facts: Facts,
    tokens: Tokens,
    down: fx.Node,
    stream: frozenset[fx.Node],
    order: Mapping[fx.Node, int],
) -> Mlp | NoMatch | None:
    """The MLP that ends in ``down``; ``None`` if it is some other linear layer."""
    ups: list[fx.Node] = []
    between: list[fx.Node] = []
    stack, seen = [_data_operand(facts, down)], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_linear(facts, tokens, node):
            ups.append(node)
            continue
        what = facts.effects[node].what
        if node in stream or what not in (What.POINTWISE, What.VIEW, What.NORM):
            mixes = what is What.MIX and not tokens.made_by(node, facts.dims(node))
            if mixes or _projects_tokens(facts, tokens, node):
                return NoMatch(PATTERN, reasons.MIXED_INSIDE, (down, node))
            return None
        between.append(node)
        stack += _data_operands(facts, node)
    products = [n for n in between if n.target is aten.mul.Tensor and _both_data(facts, n)]
    nonlinear = [
        n
        for n in between
        if facts.effects[n].what is What.POINTWISE and n.target not in LINEAR_STEPS
    ]
    if not nonlinear and not products:
        return NoMatch(PATTERN, reasons.LINEAR_ONLY, (down, *ups))
    ups.sort(key=order.__getitem__)
    return Mlp(_data_operand(facts, ups[0]), (*ups, down), bool(products) and len(ups) > 1)


def _chained(outer: Mlp, inner: list[Mlp]) -> Mlp:
    """One MLP of three linear layers or more, where one ends in the middle of another."""
    if not inner:
        return outer
    linears = dict.fromkeys((*(linear for mlp in inner for linear in mlp.linears), *outer.linears))
    return Mlp(inner[0].input, tuple(linears), outer.gated or any(mlp.gated for mlp in inner))


def _projects_tokens(facts: Facts, tokens: Tokens, node: fx.Node) -> bool:
    """Whether ``node`` multiplies tokens, and not channels, with a constant matrix."""
    effect = facts.effects[node]
    touched = any(tokens.touched_by(axis) for axis in effect.mixed)
    return effect.what is What.CONTRACT and touched and len(_data_operands(facts, node)) == 1


def _data_operands(facts: Facts, node: fx.Node) -> list[fx.Node]:
    return [o for o in operands(node) if any(is_data(dim) for dim in facts.dims(o))]


def _data_operand(facts: Facts, node: fx.Node) -> fx.Node:
    return _data_operands(facts, node)[0]


def _both_data(facts: Facts, node: fx.Node) -> bool:
    return len(_data_operands(facts, node)) > 1
