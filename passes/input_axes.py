"""What the axes of a graph's inputs are: images, channels, or something that makes tokens."""

from __future__ import annotations

import torch
from torch import fx

from tokenpass.dims import Axis, Dims, Kind, axes_of, is_data, made_of, same
from tokenpass.facts import Facts, What
from tokenpass.graph import operands, values_of

aten = torch.ops.aten


CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)


def image_axes(facts: Facts) -> frozenset[Axis]:
    """The axes of the batch: input axes along which nothing meets up to the last attention.

    What comes after it (a loss, an operation that nobody understands) does not matter. Where
    nothing attends, as in the piece of a model behind a graph break, images and tokens look alike:
    the first dimension of every input is then taken for the images. So it is where nobody
    understands an operation before the last attention.
    """
    nodes = list(facts.graph.nodes)
    meeting = (What.SOFTMAX, What.ATTENTION)
    last = [n for n in nodes if facts.effects[n].what in meeting] or [
        n for n in nodes if facts.effects[n].what is What.CONTRACT
    ]
    upstream: set[fx.Node] = set()
    pending = last[-1:]
    while pending:
        node = pending.pop()
        if node not in upstream:
            upstream.add(node)
            pending += node.all_input_nodes
    first = first_axes(facts, 1)
    effects = [facts.effects[node] for node in upstream]
    guessed = {axis for effect in effects if effect.what is What.OPAQUE for axis in effect.mixed}
    mixed = {axis for effect in effects if effect.what is not What.OPAQUE for axis in effect.mixed}
    unmixed = _input_axes(facts) - made_of(mixed) - (guessed - first)
    if any(facts.effects[n].what in meeting for n in nodes):
        return unmixed
    return unmixed & first


def first_axes(facts: Facts, rank: int) -> frozenset[Axis]:
    """The axes that inputs of at least so many dimensions begin with."""
    return axes_of(dims[0] for dims in _inputs(facts) if len(dims) >= rank) & _input_axes(facts)


def channel_axes(facts: Facts) -> frozenset[Axis]:
    """Input axes that are channels: a linear layer sums over all of them, or a norm runs there."""
    found: set[Axis] = set()
    for node in facts.graph.nodes:
        effect = facts.effects[node]
        if effect.what is What.CONTRACT and _data_operands(facts, node) == 1:
            dims = [dim for work in effect.work for dim in work.inner]
            found |= {f.axis for dim in dims for f in dim if same(f.size, f.axis.size)}
        elif effect.what is What.NORM:
            dims = [dim for dims in effect.outs for dim in dims]
            whole_ones = {f.axis for dim in dims for f in dim if same(f.size, f.axis.size)}
            found |= effect.mixed & whole_ones
    return _input_axes(facts) & found


def _inputs(facts: Facts) -> list[Dims]:
    placeholders = facts.graph.find_nodes(op="placeholder")
    return [dims for node in placeholders for dims in facts.effects[node].outs]


def _input_axes(facts: Facts) -> frozenset[Axis]:
    return frozenset(
        axis
        for axis in axes_of(dim for dims in _inputs(facts) for dim in dims)
        if axis.data and axis.kind is Kind.INPUT
    )


def _data_operands(facts: Facts, node: fx.Node) -> int:
    return sum(any(is_data(dim) for dim in facts.dims(source)) for source in operands(node))


def varying_nodes(facts: Facts, constants: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Everything that is computed from the user's input."""
    found: set[fx.Node] = set()
    for node in facts.graph.nodes:
        is_input = node.op == "placeholder" and node not in constants and values_of(node)
        if is_input or any(source in found for source in operands(node)):
            found.add(node)
    return frozenset(found)


def patch_rows(facts: Facts) -> frozenset[Axis]:
    """Input axes that count patches: each row of pixels is laid out anew and convolved to a token.

    Encoders of images of any size take such rows, one behind the other.
    """
    found: set[Axis] = set()
    for node in facts.graph.nodes:
        if getattr(node.target, "overloadpacket", None) not in CONVOLUTIONS:
            continue
        rows, _, *window = facts.dims(operands(node)[0])
        _, _, *positions = facts.dims(node)
        if len(rows) == 1 and rows[0].axis.kind is Kind.INPUT and not any(positions):
            axis = rows[0].axis
            pixels = axes_of(
                dims[1] for dims in _inputs(facts) if len(dims) == 2 and dims[0] == rows
            )
            if same(axis.size, rows[0].size) and axes_of(window) and axes_of(window) <= pixels:
                found.add(axis)
    return frozenset(found)
