"""Axis rules of convolution, pooling, resizing and padding: positions see their neighbours."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from tokenpass.axis_rule import Rule, RuleContext, out_shape
from tokenpass.dims import Axis, Dim, Dims, Kind, Size, axes_of, is_data, same, size_of
from tokenpass.facts import Effect, What, Work
from tokenpass.graph import arguments, operands, shape_of, tensor_of, values_of

aten = torch.ops.aten


def _positions(
    ctx: RuleContext, node: fx.Node, before: Dims, after: tuple[Size, ...]
) -> tuple[Dims, frozenset[Axis]]:
    """Dimensions of the positions after a window has slid over them.

    Where their number stays, position ``i`` of the result sits on position ``i`` of the input: the
    axis is the same one, its positions are mixed. Elsewhere the axis is new.
    """
    outs = tuple(
        dim if same(size_of(dim), size) else ctx.fresh(Kind.SPATIAL, size, node, data=is_data(dim))
        for dim, size in zip(before, after, strict=True)
    )
    return outs, axes_of(before)


def _convolution(spatial: int) -> Rule:
    def rule(ctx: RuleContext, node: fx.Node) -> Effect:
        sources = operands(node)
        x, weight = ctx.dims(sources[0]), ctx.dims(sources[1])
        kernel = shape_of(tensor_of(sources[1]))[2:]
        lead, channel, before = x[: -spatial - 1], x[-spatial - 1], x[-spatial:]
        after = out_shape(node)[-spatial:]
        given = arguments(node)
        one = all(same(size, sympy.Integer(1)) for size in kernel)
        unchanged = one and _step_is_one(given) and given["padding"] in ([0] * spatial, "valid")
        groups = given.get("groups", 1)
        features = out_shape(node)[-spatial - 1]
        depthwise = same(size_of(channel), features) and same(features, sympy.Integer(groups))
        out_channel = channel if depthwise else weight[0]
        positions, mixed = (
            (before, frozenset[Axis]()) if unchanged else _positions(ctx, node, before, after)
        )
        outs = (*lead, out_channel, *positions)
        inner = shape_of(tensor_of(sources[1]))[1]
        work = Work(outs, (), inner * sympy.Mul(*kernel))
        what = What.CONTRACT if unchanged and not depthwise else What.MIX
        what = What.POINTWISE if unchanged and depthwise else what
        mixed |= frozenset() if depthwise else axes_of([channel])
        seen = (x, weight, *((out_channel,) for _ in sources[2:]))
        return Effect(what, (outs,), seen, mixed, (work,))

    return rule


def _step_is_one(given: dict[str, Any]) -> bool:
    return all(step == 1 for step in given["stride"])


def _transposed_convolution(spatial: int) -> Rule:
    def rule(ctx: RuleContext, node: fx.Node) -> Effect:
        sources = operands(node)
        x, weight = ctx.dims(sources[0]), ctx.dims(sources[1])
        lead, channel, before = x[: -spatial - 1], x[-spatial - 1], x[-spatial:]
        shape = out_shape(node)
        positions, mixed = _positions(ctx, node, before, shape[-spatial:])
        features = ctx.fresh(Kind.CONSTANT, shape[-spatial - 1], node, data=False)
        outs = (*lead, features, *positions)
        kernel = shape_of(tensor_of(sources[1]))
        work = Work((*lead, channel, *before), (), sympy.Mul(*kernel[1:]))
        seen = (x, weight, *((features,) for _ in sources[2:]))
        return Effect(What.MIX, (outs,), seen, mixed | axes_of([channel]), (work,))

    return rule


def _window(spatial: int) -> Rule:
    """Pooling and resizing: channels stay, positions slide."""

    def rule(ctx: RuleContext, node: fx.Node) -> Effect:
        (x,) = (ctx.dims(source) for source in operands(node)[:1])
        shape = out_shape_of_first(node)
        positions, mixed = _positions(ctx, node, x[-spatial:], shape[-spatial:])
        outs = (*x[:-spatial], *positions)
        to_one = all(same(size, sympy.Integer(1)) for size in shape[-spatial:])
        adaptive = "output_size" in arguments(node) and "kernel_size" not in arguments(node)
        what = What.AVERAGE if to_one and adaptive else What.MIX
        return Effect(what, tuple(outs for _ in values_of(node)), (x,), mixed)

    return rule


def out_shape_of_first(node: fx.Node) -> tuple[Size, ...]:
    return shape_of(values_of(node)[0])


def _pad(ctx: RuleContext, node: fx.Node) -> Effect:
    """Constant padding lays new positions before and after the old ones."""
    (x,) = (ctx.dims(source) for source in operands(node))
    given = arguments(node)
    if given.get("mode", "constant") != "constant":
        return ctx.opaque(node, f"padding with mode {given['mode']!r}")
    outs, widths = list(x), given["pad"]
    if not all(isinstance(width, int) and width >= 0 for width in widths):
        return ctx.opaque(node, "padding by a negative or computed amount")
    for index in range(len(widths) // 2):
        place = len(x) - 1 - index
        left, right = widths[2 * index], widths[2 * index + 1]
        pieces: list[Dim] = [x[place]]
        if left:
            pieces.insert(0, _padding(ctx, node, left))
        if right:
            pieces.append(_padding(ctx, node, right))
        outs[place] = ctx.table.concat(pieces, node)
    return Effect(What.VIEW, (tuple(outs),), (x,))


def _padding(ctx: RuleContext, node: fx.Node, width: int) -> Dim:
    return ctx.fresh(Kind.CONSTANT, sympy.Integer(width), node, data=False)


def _im2col(ctx: RuleContext, node: fx.Node) -> Effect:
    """``nn.Unfold``: one column for each position of a sliding window."""
    (source,) = operands(node)
    x, given = ctx.dims(source), arguments(node)
    sizes = shape_of(tensor_of(source))[-2:]
    windows: list[Size] = []
    for index, size in enumerate(sizes):
        kernel, dilation, padding, stride = (
            given[name][index] for name in ("kernel_size", "dilation", "padding", "stride")
        )
        span = size + 2 * padding - dilation * (kernel - 1) - 1
        windows.append(sympy.floor(span / stride) + 1)
    shape = out_shape(node)
    if not same(sympy.Mul(*windows), shape[-1]):
        return ctx.opaque(node, "number of windows not known")
    grid = [
        ctx.fresh(Kind.SPATIAL, size, node, data=is_data(dim))
        for size, dim in zip(windows, x[-2:], strict=True)
    ]
    channel = ctx.fresh(Kind.OPAQUE, shape[-2], node, data=False)
    outs = (*x[:-3], channel, (*grid[0], *grid[1]))
    return Effect(What.MIX, (outs,), (x,), axes_of(x[-3:]))


RULES: dict[object, Rule] = {
    aten.conv1d: _convolution(1),
    aten.conv2d: _convolution(2),
    aten.conv3d: _convolution(3),
    aten.conv_transpose1d: _transposed_convolution(1),
    aten.conv_transpose2d: _transposed_convolution(2),
    aten.conv_transpose3d: _transposed_convolution(3),
    aten.avg_pool1d: _window(1),
    aten.avg_pool2d: _window(2),
    aten.avg_pool3d: _window(3),
    aten.max_pool1d: _window(1),
    aten.max_pool2d: _window(2),
    aten.max_pool3d: _window(3),
    aten.max_pool2d_with_indices: _window(2),
    aten.adaptive_avg_pool1d: _window(1),
    aten.adaptive_avg_pool2d: _window(2),
    aten.adaptive_avg_pool3d: _window(3),
    aten.adaptive_max_pool2d: _window(2),
    aten.upsample_linear1d: _window(1),
    aten.upsample_nearest1d: _window(1),
    aten.upsample_bilinear2d: _window(2),
    aten.upsample_bicubic2d: _window(2),
    aten.upsample_nearest2d: _window(2),
    aten._upsample_bilinear2d_aa: _window(2),
    aten._upsample_bicubic2d_aa: _window(2),
    aten.upsample_trilinear3d: _window(3),
    aten.upsample_nearest3d: _window(3),
    aten.pad: _pad,
    aten.constant_pad_nd: _pad,
    aten.im2col: _im2col,
}
