"""A gated graph: once in full, once behind its gates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tokenpass.capture import Captured
from tokenpass.facts import Facts
from tokenpass.gates import change, let_through, over_threshold, positions_of
from tokenpass.gating import Gating, needed_nodes
from tokenpass.graph import arguments, operands
from tokenpass.held import in_places
from tokenpass.merging import rows_of_all
from tokenpass.passes.graph_run import GraphRun
from tokenpass.passes.update_attention import AttentionUpdates
from tokenpass.state import StateTable


def holding(graph: fx.Graph) -> list[fx.Node]:
    """The cuts of a graph whose tokens keep their places."""
    return graph.find_nodes(op="call_function", target=torch.ops.tokenpass.hold.default)


class GateRun(GraphRun):
    """Runs the original graph with the state of a stream."""

    rule = "gate"

    def __init__(self, captured: Captured, facts: Facts, plan: Gating, state: StateTable) -> None:
        super().__init__(captured, facts)
        self.plan = plan
        self.state = state
        self.updates = AttentionUpdates(facts, plan, state)
        self.attention_of = {item.attention.out: item for item in plan.attentions}
        self.held = {node: state["held", n] for n, node in enumerate(holding(facts.graph))}

    def names_of_state(self, buffers: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """Values that may share memory with the state: ``buffers``, attentions, views of them."""
        found = {*buffers, *self.attention_of}
        for node in self.module.graph.nodes:
            if any(source in found for source in operands(node)) and node not in found:
                returns = getattr(getattr(node.target, "_schema", None), "returns", ())
                if any(item.alias_info is not None for item in returns):
                    found.add(node)
        return frozenset(found)


class FullRun(GateRun):
    """Computes everything, and writes down what the gates have to remember."""

    def visit(self, node: fx.Node) -> None:
        item = self.attention_of.get(node)
        if item is not None and item.mode != "delta":
            self.env[node] = self.updates.compute(item, self.env)
            return
        self.env[node] = self.compute(node)
        if item is not None:
            self.updates.record(item, self.env)
        if node in self.held:
            self.held[node].copy_(self.env[operands(node)[1]])

    def finish(self, output: fx.Node) -> Any:
        for number, region in enumerate(self.plan.regions):
            for kind, nodes in (("reference", region.inputs), ("buffer", region.outputs)):
                for place, node in enumerate(nodes):
                    self.state[number, kind, place].copy_(self.rows(region, node))
        return self.outputs(output, self.names_of_state(()))


class IncrementalRun(GateRun):
    """Runs the regions on what their gates let through, and reads the rest from the buffers."""

    def __init__(
        self,
        captured: Captured,
        facts: Facts,
        plan: Gating,
        state: StateTable,
        budget: Sequence[Any],
    ) -> None:
        super().__init__(captured, facts, plan, state)
        given = iter(budget)
        counted = plan.method.keep is not None
        self.counts = {size: next(given) for size in plan.sizes} if counted else {}
        fixed = counted and plan.method.threshold is None
        self.exchanges = {size: next(given) for size in plan.exchanging} if fixed else {}
        self.threshold = next(given, None)
        self.region_of = {node: n for n, r in enumerate(plan.regions) for node in r.nodes}
        self.needed = needed_nodes(self.module.graph, plan)
        self.passed: dict[int, Tensor] = {}
        self.finite: list[Tensor] = []
        self.always: dict[object, Tensor] = {}

    def visit(self, node: fx.Node) -> None:
        if node not in self.needed:
            return
        if node in self.region_of:
            number = self.region_of[node]
            if number not in self.passed:
                self._gate(number)
        elif node in self.attention_of:
            self.env[node] = self.updates.update(self.attention_of[node], self.env)
        elif node in self.held:
            self.env[node] = self._in_their_places(node)
        else:
            self.env[node] = self.compute(node)

    def _in_their_places(self, node: fx.Node) -> Tensor:
        """What a cut leaves, in the order of the last frame."""
        kept, positions = (self.env[source] for source in operands(node))
        held = self.held[node]
        order = in_places(positions, held, int(arguments(node)["tokens"]))
        held.copy_(positions.gather(1, order))
        placed: Tensor = kept.gather(1, order)
        return placed

    def finish(self, output: fx.Node) -> Any:
        buffers = [node for region in self.plan.regions for node in region.outputs]
        outputs = self.outputs(output, self.names_of_state(buffers))
        finite = torch.stack(self.finite).all()
        return (*outputs, finite, *(self.passed[n] for n in range(len(self.plan.regions))))

    def _gate(self, number: int) -> None:
        region = self.plan.regions[number]
        layout = region.layout
        for node in region.inputs:
            self.ensure(node)
        now = [self.rows(region, node) for node in region.inputs]
        before = [self.state[number, "reference", p] for p in range(len(now))]
        moved = change(now, before, float(self.plan.method.norm))
        self.finite.append(moved.isfinite().all())
        if self.plan.method.ranking == "random":
            moved = torch.rand_like(moved)
        positions, valid = self._selected(number, moved)
        rows = rows_of_all(positions, layout.count)
        taken = [x.index_select(0, rows) for x in now]
        if valid is not None:
            last = [x.index_select(0, rows) for x in before]
            chosen = valid.reshape(-1, 1)
            taken = [torch.where(chosen, x, y) for x, y in zip(taken, last, strict=True)]
        for reference, x in zip(before, taken, strict=True):
            reference.index_copy_(0, rows, x)
        self.updates.remember(number, positions, valid, self.exchanges.get(region.size))
        computed = self.on_some(region, taken, rows)
        for place, (node, new) in enumerate(zip(region.outputs, computed, strict=True)):
            dims = self.facts.dims(node)
            buffer = self.state[number, "buffer", place]
            if valid is not None:
                new = torch.where(valid.reshape(-1, 1), new, buffer.index_select(0, rows))
            buffer.index_copy_(0, rows, new)
            self.env[node] = layout.full(buffer, dims)

    def _selected(self, number: int, moved: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions in each image ``(B, U)``, and which of them pass if not all do.

        The others are fillers: run on what they last used, they give what is remembered of them.
        """
        region = self.plan.regions[number]
        images, tokens = region.layout.images, region.layout.count
        fixed = self._always(region.fixed, tokens, moved.device) if region.fixed else None
        most = self.counts.get(region.size)
        if self.threshold is None:
            assert most is not None
            positions = let_through(moved, images, fixed, most)
            self.passed[number] = positions
            return positions, None
        passing = over_threshold(moved, images, fixed, self.threshold, most)
        self.passed[number] = passing
        return positions_of(passing)

    def _always(self, places: tuple[int, ...], tokens: int, device: torch.device) -> Tensor:
        """Which tokens every gate lets through, ``(N,)``, bool: once in a graph."""
        key = (places, tokens, device)
        if key not in self.always:
            mask = torch.zeros(tokens, dtype=torch.bool, device=device)
            self.always[key] = mask.index_fill(0, torch.tensor(places, device=device), True)
        return self.always[key]
