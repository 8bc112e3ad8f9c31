"""Tokens that part, are computed with alone and meet again, as one computation on all of them.

Rotary positions leave prefix tokens alone: ``cat([x[:, :1], rotate(x[:, 1:])], 1)``. A gate runs
its region on rows of any tokens, so nothing in it may slice the token axis. What is computed with a
part is therefore computed with all tokens, tables padded with zeros, and ``where`` takes from each
computation the tokens that it is for: the same numbers, and a few rows that nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from tokenpass.capture import Captured, recapture
from tokenpass.dims import Axis, Dim, Dims, axes_of, concat_axis, is_data, same, size_of
from tokenpass.facts import Facts, What
from tokenpass.graph import arguments, operands, with_arguments
from tokenpass.passes.graph_run import GraphRun

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """Some neighbours among all tokens.

    Attributes:
        dim: Of these tokens.
        all: Of all tokens.
        start: The first of them.
    """

    dim: Dim
    all: Dim
    start: int

    @property
    def padding(self) -> tuple[int, int]:
        """Tokens before and behind."""
        behind = size_of(self.all) - size_of(self.dim) - self.start
        return self.start, int(behind)


@dataclass(frozen=True)
class Join:
    """A ``cat`` of what became of all tokens: its operands and the parts that they are."""

    node: fx.Node
    place: int
    parts: tuple[tuple[fx.Node, Part], ...]


def rejoin(captured: Captured, facts: Facts) -> Captured | None:
    """The graph with such parts computed with all tokens; ``None`` where there are none."""
    joins = {join.node: join for join in map(_Widening(facts).join, facts.graph.nodes) if join}
    if not joins:
        return None
    return recapture(captured, lambda *inputs: _Rejoining(captured, facts, joins).run(inputs))


class _Widening:
    """Decides what can be computed with all tokens."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._known: dict[tuple[fx.Node, Part], bool] = {}

    def join(self, node: fx.Node) -> Join | None:
        if node.target is not aten.cat.default or len(self._facts.effects[node].outs) != 1:
            return None
        dims = self._facts.dims(node)
        place = arguments(node).get("dim", 0) % len(dims)
        whole = concat_axis(dims[place])
        sizes = [size_of(self._facts.dims(source)[place]) for source in operands(node)]
        if whole is None or not whole.data or not all(size.is_Integer for size in sizes):
            return None
        parts, start = [], 0
        for source, size in zip(operands(node), sizes, strict=True):
            part = Part(self._facts.dims(source)[place], dims[place], start)
            parts.append((source, part))
            start += int(size)
        if all(self.widens(source, part) for source, part in parts):
            return Join(node, place, tuple(parts))
        return None

    def widens(self, node: fx.Node, part: Part) -> bool:
        """Whether ``node``, computed with a part, can be computed with all tokens."""
        key = (node, part)
        if key not in self._known:
            self._known[key] = takes(self._facts, node, part) or self._computed(node, part)
        return self._known[key]

    def _computed(self, node: fx.Node, part: Part) -> bool:
        effect = self._facts.effects[node]
        own = axes_of([part.dim])
        alone = effect.what is not What.OPAQUE and not effect.mixed & own
        if node.op != "call_function" or not is_data(part.dim) or not alone:
            return False
        literals = [dim for literal in effect.literals for dim in literal.dims]
        if len(effect.outs) != 1 or not all(
            _once(dims, part, own) for dims in (effect.outs[0], *effect.seen)
        ):
            return False
        others = [dim for dim in literals if dim != part.dim]
        if axes_of(others) & own or not all(size_of(dim).is_Integer for dim in others):
            return False
        return all(
            self.widens(source, part)
            for source, _ in self._facts.seen(node)
            if part.dim in self._facts.dims(source)
        )


def _once(dims: Dims, part: Part, own: frozenset[Axis]) -> bool:
    """Whether a part is one of the dimensions, and in no other."""
    return dims.count(part.dim) == 1 and not any(
        axes_of([dim]) & own for dim in dims if dim != part.dim
    )


def takes(facts: Facts, node: fx.Node, part: Part) -> bool:
    """Whether ``node`` slices a part out of all tokens."""
    if node.target is not aten.slice.Tensor:
        return False
    (source,) = operands(node)
    given, before = arguments(node), facts.dims(source)
    place = given["dim"] % len(before)
    start = given["start"] or 0
    size = size_of(facts.dims(node)[place])
    return (
        before[place] == part.all
        and given["step"] == 1
        and same(size, size_of(part.dim))
        and start % int(size_of(part.all)) == part.start
    )


class _Rejoining(GraphRun):
    """Runs the graph, each join on all tokens."""

    rule = "rejoin"

    def __init__(self, captured: Captured, facts: Facts, joins: dict[fx.Node, Join]) -> None:
        super().__init__(captured, facts)
        self.joins = joins
        self.wide: dict[tuple[fx.Node, Part], Tensor] = {}
        self.padded: dict[tuple[fx.Node, Part, int], Tensor] = {}
        self.since: dict[tuple[Part, int, torch.device], Tensor] = {}

    def visit(self, node: fx.Node) -> None:
        join = self.joins.get(node)
        self.env[node] = self.compute(node) if join is None else self._joined(join)

    def finish(self, output: fx.Node) -> tuple[Any, ...]:
        return self.outputs(output, frozenset())

    def _joined(self, join: Join) -> Tensor:
        (first, part), *others = join.parts
        joined = self._whole(first, part)
        behind = joined.dim() - join.place - 1
        for source, part in others:
            since = self._since(part, behind, joined.device)
            joined = torch.where(since, self._whole(source, part), joined)
        return joined

    def _since(self, part: Part, behind: int, device: torch.device) -> Tensor:
        """Which tokens are those of a part or later ones, for ``behind`` dimensions after them."""
        key = (part, behind, device)
        if key not in self.since:
            tokens = torch.arange(int(size_of(part.all)), device=device)
            self.since[key] = (tokens >= part.start).reshape([-1] + [1] * behind)
        return self.since[key]

    def _whole(self, node: fx.Node, part: Part) -> Tensor:
        """What ``node`` computes with a part, computed with all tokens."""
        if (node, part) not in self.wide:
            self.wide[node, part] = self._widened(node, part)
        return self.wide[node, part]

    def _widened(self, node: fx.Node, part: Part) -> Tensor:
        if takes(self.facts, node, part):
            found: Tensor = self.env[operands(node)[0]]
            return found
        effect = self.facts.effects[node]
        seen = iter(effect.seen)
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda source: self._operand(source, next(seen), part)
        )
        changes: dict[str, Any] = {}
        for literal in effect.literals:
            dims = [part.all if dim == part.dim else dim for dim in literal.dims]
            sizes = [int(size_of(dim)) for dim in dims]
            changes[literal.argument] = literal.value(sizes, int(literal.offset))
        result: Tensor = self.call(node, *with_arguments(node, args, kwargs, changes))
        return result

    def _operand(self, source: fx.Node, seen: Dims, part: Part) -> Any:
        own = self.facts.dims(source)
        if part.dim in own:
            return self._whole(source, part)
        table = self.env[source]
        behind = len(seen) - seen.index(part.dim) - 1
        if len(own) <= behind or not own[len(own) - 1 - behind]:
            return table
        key = (source, part, behind)
        if key not in self.padded:
            self.padded[key] = functional.pad(table, [0, 0] * behind + [*part.padding])
        return self.padded[key]
