"""Running a captured graph once while a new one is traced, token-wise regions on some rows only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from tokenpass import torch_internals as internals
from tokenpass.capture import Captured, in_region_of
from tokenpass.facts import Facts
from tokenpass.gating import Region
from tokenpass.graph import values_of, with_arguments


class GraphRun:
    """Runs the original graph while a new one is traced.

    Attributes:
        env: What each node of the original has computed so far.
        rule: The name of the rewrite, for the provenance of new nodes.
    """

    rule = ""

    def __init__(self, captured: Captured, facts: Facts) -> None:
        self.module = captured.module
        self.facts = facts
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
                with internals.provenance(node, self.rule):
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

    def ensure(self, node: fx.Node) -> None:
        """Compute a value ahead of its turn, where a region begins before all that it reads."""
        if node not in self.env:
            for source in node.all_input_nodes:
                self.ensure(source)
            self.visit(node)

    def outputs(self, output: fx.Node, shared: frozenset[fx.Node]) -> tuple[Any, ...]:
        """The original's outputs; copies of those that lie in the state."""

        def produce(node: fx.Node) -> Any:
            value = self.env[node]
            return value.clone() if node in shared else value

        outputs = fx.map_arg(output.args[0], produce)
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)

    def rows(self, region: Region, node: fx.Node) -> Tensor:
        """The rows of a value that ``region`` reads or computes, ``(B * N, F)``."""
        return region.layout.rows(self.env[node], self.facts.dims(node))

    def on_some(self, region: Region, taken: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """What ``region`` computes of some tokens.

        Args:
            region: The operations.
            taken: Rows of each of its inputs, ``(R, F)``.
            rows: Which ones they are, ``(R,)``.

        Returns:
            Rows of each of its outputs, ``(R, F)``.
        """
        layout = region.layout
        local = {
            node: layout.some(x, self.facts.dims(node))
            for node, x in zip(region.inputs, taken, strict=True)
        }
        for node in region.nodes:
            with internals.provenance(node, self.rule):
                local[node] = self._on_some(node, local, region, rows)
        count = rows.shape[0]
        return [
            layout.rows_of_some(local[node], self.facts.dims(node), count)
            for node in region.outputs
        ]

    def _on_some(
        self, node: fx.Node, local: dict[fx.Node, Tensor], region: Region, rows: Tensor
    ) -> Any:
        seen = iter(self.facts.effects[node].seen)
        layout, count = region.layout, rows.shape[0]

        def produce(source: fx.Node) -> Any:
            dims = next(seen) if values_of(source) else ()
            if source in local:
                return local[source]
            self.ensure(source)
            if not values_of(source):
                return self.env[source]
            return layout.meet(self.env[source], self.facts.dims(source), dims, rows)

        args, kwargs = fx.map_arg((node.args, node.kwargs), produce)
        changes: dict[str, Any] = {}
        for literal in self.facts.effects[node].literals:
            sizes = layout.sizes(literal.dims, count)
            changes[literal.argument] = literal.value(sizes, int(literal.offset))
        return self.call(node, *with_arguments(node, args, kwargs, changes))
