"""Axis rules of slicing, selecting and concatenating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from tokenpass.axis_rule import Rule, RuleContext, join, number, out_shape, position
from tokenpass.dims import (
    ZERO,
    Axis,
    Dim,
    Kind,
    Size,
    axes_of,
    concat_axis,
    is_data,
    parts_of,
    regroup,
    same,
    size_of,
)
from tokenpass.facts import Effect, Literal, What
from tokenpass.graph import arguments, operands

aten = torch.ops.aten

END = 2**63 - 1
"""What a slice to the end has for its end."""


def _bounds(given: dict[str, Any], size: Size) -> tuple[Size, Size, int]:
    """Start, stop and step of a slice along a dimension of ``size``, from zero up."""

    def resolve(value: Any, default: Size) -> Size:
        if value is None:
            return default
        bound = number(value)
        if bound.is_negative:
            return sympy.Max(bound + size, ZERO)
        if bound == END or (bound - size).is_nonnegative:
            return size
        return bound if (bound - size).is_nonpositive else sympy.Min(bound, size)

    start, stop = resolve(given["start"], ZERO), resolve(given["end"], size)
    return start, sympy.Max(start, stop), given["step"]


def _slice(ctx: RuleContext, node: fx.Node) -> Effect:
    source = operands(node)[0]
    before, given = ctx.dims(source), arguments(node)
    place = position(given["dim"], len(before))
    dim = before[place]
    start, stop, step = _bounds(given, size_of(dim))
    if not dim:
        return Effect(What.VIEW, (before,), (before,))
    if same(start, ZERO) and same(stop, size_of(dim)) and step == 1:
        bounds = _slice_literals([(ZERO, dim)], start, stop)
        return Effect(What.VIEW, (before,), (before,), literals=bounds)
    if step != 1:
        size = out_shape(node)[place]
        digit = _every(dim, start, sympy.Integer(step), size)
        taken = ctx.fresh(Kind.OPAQUE, size, node, data=is_data(dim)) if digit is None else digit
        outs = (*before[:place], taken, *before[place + 1 :])
        what = What.INDEX if digit is None else What.VIEW
        return Effect(what, (outs,), (before,), axes_of([dim]))
    taken = ctx.table.slice(dim, start, stop, node)
    outs = (*before[:place], taken, *before[place + 1 :])
    kept = set(parts_of(taken))
    pieces = [(begin, part) for begin, part in _offsets(dim)]
    cut = {
        part for begin, part in pieces if part not in kept and _overlaps(begin, part, start, stop)
    }
    literals = _slice_literals(pieces, start, stop)
    return Effect(What.VIEW, (outs,), (before,), axes_of(cut), literals=literals)


def _every(dim: Dim, start: Size, step: Size, size: Size) -> Dim | None:
    """Every ``step``-th position of a dimension: one digit of it, as of ``reshape`` and ``select``.

    ``None`` where ``step`` does not divide the dimension, or a concatenation is taken apart.
    """
    first = (start - step).is_negative
    if concat_axis(dim) is not None or not first or not same(size_of(dim), step * size):
        return None
    outer, _ = regroup([dim], [size, step])[0]
    return outer


def _offsets(dim: Dim) -> list[tuple[Size, Dim]]:
    begin, found = ZERO, []
    for part in parts_of(dim):
        found.append((begin, part))
        begin += size_of(part)
    return found


def _overlaps(begin: Size, part: Dim, start: Size, stop: Size) -> bool:
    low, high = sympy.Max(begin, start), sympy.Min(begin + size_of(part), stop)
    return not (high - low).is_nonpositive


def _slice_literals(
    pieces: Sequence[tuple[Size, Dim]], start: Size, stop: Size
) -> tuple[Literal, ...]:
    """Start and stop as sums of the sizes of the parts before them, plus a rest."""

    def before(bound: Size, name: str) -> Literal:
        passed: list[Dim] = []
        reached = ZERO
        for begin, part in pieces:
            end = begin + size_of(part)
            if not (bound - end).is_nonnegative:
                break
            passed.append(part)
            reached = end
        return Literal(name, tuple(passed), total=True, offset=bound - reached)

    return (before(start, "start"), before(stop, "end"))


def _select(ctx: RuleContext, node: fx.Node) -> Effect:
    (source,) = operands(node)[:1]
    before, given = ctx.dims(source), arguments(node)
    place = position(given["dim"], len(before))
    dim, index = before[place], number(given["index"])
    start = index + size_of(dim) if index.is_negative else index
    outs = (*before[:place], *before[place + 1 :])
    pieces = _offsets(dim)
    hit = [part for begin, part in pieces if _overlaps(begin, part, start, start + 1)]
    mixed = axes_of(part for part in hit if len(hit) > 1 or part) if is_data(dim) else frozenset()
    (literal, _) = _slice_literals(pieces, start, start + 1)
    literal = Literal("index", literal.dims, total=True, offset=literal.offset)
    return Effect(What.VIEW, (outs,), (before,), mixed, literals=(literal,))


def _cat(ctx: RuleContext, node: fx.Node) -> Effect:
    sources = operands(node)
    rank = len(out_shape(node))
    all_dims = [ctx.dims(source) for source in sources]
    place = position(arguments(node).get("dim", 0), rank)
    pairs = [(s, d) for s, d in zip(sources, all_dims, strict=True) if len(d) == rank]
    if len(pairs) != len(sources):
        return ctx.opaque(node, "cat with an empty legacy operand")
    laid = ctx.table.concat([dims[place] for _, dims in pairs], node)
    outs: list[Dim] = []
    mixed: frozenset[Axis] = frozenset()
    for index in range(rank):
        if index == place:
            outs.append(laid)
            continue
        best, lost = join([dims[index] for _, dims in pairs])
        outs.append(best)
        mixed |= lost
    seen = tuple(
        tuple(dims[index] if index == place else outs[index] for index in range(rank))
        for _, dims in pairs
    )
    return Effect(What.VIEW, (tuple(outs),), seen, mixed)


RULES: dict[object, Rule] = {
    aten.slice: _slice,
    aten.select: _select,
    aten.cat: _cat,
}
