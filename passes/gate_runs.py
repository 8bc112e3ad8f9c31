"""Running a graph once, in full or behind gates, while a new one is traced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tokenpass import torch_internals as internals
from tokenpass.capture import Captured, in_region_of
from tokenpass.facts import Facts
from tokenpass.gates import change, flat, let_through, over_threshold, positions_of
from tokenpass.gating import Gating, Region, needed_nodes
from tokenpass.graph import operands, values_of, with_arguments
from tokenpass.passes.update_attention import AttentionUpdates
from tokenpass.state import StateTable

RULE = "gate"


class GateRun:
    """Runs the original graph while a new one is traced."""

    def __init__(self, captured: Captured, facts: Facts, plan: Gating, state: StateTable) -> None:
        self.module = captured.module
        self.facts = facts
        self.plan = plan
        self.state = state
        self.updates = AttentionUpdates(facts, plan, state)
        self.attention_of = {item.attention.out: item for item in plan.attentions}
        self.env: dict[fx.Node, Any] = {}

    def run(self, inputs: Sequence[Any]) -> Any:
        graph = self.module.graph
        self.env |= zip(graph.find_nodes(op="placeholder"), inputs, strict=True)
        for node in graph.find_nodes(op="get_attr"):
            self.env[node] = getattr(self.module, node.target)
        for node in graph.nodes:
            if node.op == "output":
                return self.finish(node)
            if node not in self.env:
                with internals.provenance(node, RULE):
                    self.visit(node)
        raise AssertionError("a graph without an output")

    def visit(self, node: fx.Node) -> None:
        """Compute one node of the original."""
        raise NotImplementedError

    def finish(self, output: fx.Node) -> Any:
        """The new graph's outputs."""
        raise NotImplementedError

    def compute(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        return self.call(node, args, kwargs)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        assert callable(node.target)
        with in_region_of(node):
            return node.target(*args, **kwargs)

    def outputs(self, output: fx.Node, shared: frozenset[fx.Node]) -> tuple[Any, ...]:
        """The original's outputs; copies of those that lie in the state."""

        def produce(node: fx.Node) -> Any:
            value = self.env[node]
            return value.clone() if node in shared else value

        outputs = fx.map_arg(output.args[0], produce)
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)

    def names_of_state(self, buffers: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """Values that may share memory with the state: ``buffers``, attentions, views of them."""
        found = {*buffers, *self.attention_of}
        for node in self.module.graph.nodes:
            if any(source in found for source in operands(node)) and node not in found:
                returns = getattr(getattr(node.target, "_schema", None), "returns", ())
                if any(item.alias_info is not None for item in returns):
                    found.add(node)
        return frozenset(found)

    def rows(self, region: Region, node: fx.Node) -> Tensor:
        return region.layout.rows(self.env[node], self.facts.dims(node))


class FullRun(GateRun):
    """Computes everything, and writes down what the gates have to remember."""

    def visit(self, node: fx.Node) -> None:
        item = self.attention_of.get(node)
        if item is not None and item.mode == "exact":
            self.env[node] = self.updates.compute(item, self.env)
            return
        self.env[node] = self.compute(node)
        if item is not None:
            self.updates.record(item, self.env)

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

    def visit(self, node: fx.Node) -> None:
        if node not in self.needed:
            return
        if node in self.region_of:
            number = self.region_of[node]
            if number not in self.passed:
                self._gate(number)
        elif node in self.attention_of:
            self.env[node] = self.updates.update(self.attention_of[node], self.env)
        else:
            self.env[node] = self.compute(node)

    def finish(self, output: fx.Node) -> Any:
        buffers = [node for region in self.plan.regions for node in region.outputs]
        outputs = self.outputs(output, self.names_of_state(buffers))
        finite = torch.stack(self.finite).all()
        return (*outputs, finite, *(self.passed[n] for n in range(len(self.plan.regions))))

    def _gate(self, number: int) -> None:
        region = self.plan.regions[number]
        layout = region.layout
        for node in region.inputs:
            self._ensure(node)
        now = [self.rows(region, node) for node in region.inputs]
        before = [self.state[number, "reference", p] for p in range(len(now))]
        moved = change(now, before, float(self.plan.method.norm))
        self.finite.append(moved.isfinite().all())
        if self.plan.method.ranking == "random":
            moved = torch.rand_like(moved)
        positions, valid = self._selected(number, moved)
        rows = flat(positions, layout.count)
        taken = [x.index_select(0, rows) for x in now]
        if valid is not None:
            last = [x.index_select(0, rows) for x in before]
            chosen = valid.reshape(-1, 1)
            taken = [torch.where(chosen, x, y) for x, y in zip(taken, last, strict=True)]
        for reference, x in zip(before, taken, strict=True):
            reference.index_copy_(0, rows, x)
        self.updates.remember(number, positions, valid, self.exchanges.get(region.size))
        local = {
            node: layout.some(x, self.facts.dims(node))
            for node, x in zip(region.inputs, taken, strict=True)
        }
        for node in region.nodes:
            with internals.provenance(node, RULE):
                local[node] = self._on_some(node, local, region, rows)
        for place, node in enumerate(region.outputs):
            dims = self.facts.dims(node)
            buffer = self.state[number, "buffer", place]
            new = layout.rows_of_some(local[node], dims, rows.shape[0])
            if valid is not None:
                new = torch.where(valid.reshape(-1, 1), new, buffer.index_select(0, rows))
            buffer.index_copy_(0, rows, new)
            self.env[node] = layout.full(buffer, dims)

    def _ensure(self, node: fx.Node) -> None:
        """Compute a value ahead of its turn, where a region begins before all that it reads."""
        if node not in self.env:
            for source in node.all_input_nodes:
                self._ensure(source)
            self.visit(node)

    def _selected(self, number: int, moved: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions in each image ``(B, U)``, and which of them pass if not all do.

        The others are fillers: run on what they last used, they give what is remembered of them.
        """
        region = self.plan.regions[number]
        images, tokens = region.layout.images, region.layout.count
        fixed = None
        if region.fixed:
            places = torch.tensor(region.fixed, device=moved.device)
            fixed = torch.zeros(tokens, dtype=torch.bool, device=moved.device)
            fixed = fixed.index_fill(0, places, True)
        most = self.counts.get(region.size)
        if self.threshold is None:
            assert most is not None
            positions = let_through(moved, images, fixed, most)
            self.passed[number] = positions
            return positions, None
        passing = over_threshold(moved, images, fixed, self.threshold, most)
        self.passed[number] = passing
        return positions_of(passing)

    def _on_some(
        self, node: fx.Node, local: dict[fx.Node, Tensor], region: Region, rows: Tensor
    ) -> Any:
        """What ``node`` computes of the tokens that passed."""
        seen = iter(self.facts.effects[node].seen)
        layout, count = region.layout, rows.shape[0]

        def produce(source: fx.Node) -> Any:
            dims = next(seen) if values_of(source) else ()
            if source in local:
                return local[source]
            self._ensure(source)
            if not values_of(source):
                return self.env[source]
            return layout.meet(self.env[source], self.facts.dims(source), dims, rows)

        args, kwargs = fx.map_arg((node.args, node.kwargs), produce)
        changes: dict[str, Any] = {}
        for literal in self.facts.effects[node].literals:
            sizes = layout.sizes(literal.dims, count)
            changes[literal.argument] = sum(sizes) + int(literal.offset) if literal.total else sizes
        return self.call(node, *with_arguments(node, args, kwargs, changes))
