"""What is known of a graph before anything is decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from tokenpass import torch_internals as internals
from tokenpass.arrivals import Arrivals, Handover, packed, tokens_in
from tokenpass.blocks import Found
from tokenpass.capture import Captured, GraphInputs, capture, dynamo_inputs
from tokenpass.dims import Size
from tokenpass.facts import Facts
from tokenpass.graph import expression, is_tensor
from tokenpass.layout import batch_factors
from tokenpass.passes.find_blocks import find_blocks
from tokenpass.passes.functionalise import functionalise
from tokenpass.passes.input_axes import patch_rows
from tokenpass.passes.label_axes import label_axes
from tokenpass.passes.normalise import DECOMPOSITIONS
from tokenpass.passes.rejoin import rejoin

Inputs = Sequence[Any] | GraphInputs
"""Example inputs of Dynamo's graph, or what another graph is traced again on."""


@dataclass(frozen=True)
class Analysis:
    """One graph, understood.

    Attributes:
        captured: The canonical graph.
        facts: Its axes.
        found: What the patterns found.
    """

    captured: Captured
    facts: Facts
    found: Found

    def extent(self, size: Size) -> Any:
        """A size as an integer of the running compilation."""
        return internals.symbolic_size(self.captured.mode, size)

    def handover(self) -> Handover:
        """What the graph was understood with, and what it tells of its outputs."""
        facts, known = self.facts, self.captured.arrived()
        expected = [
            tuple(dim if dim in known.get(node, ()) else None for dim in facts.dims(node))
            if node in known
            else ()
            for node in facts.graph.find_nodes(op="placeholder")
        ]
        (output,) = facts.graph.find_nodes(op="output")
        results = output.args[0] if isinstance(output.args[0], (list, tuple)) else output.args
        patches = {axis: packed(axis) for axis in patch_rows(facts)}
        told = [
            tokens_in(facts.dims(node), patches)
            if isinstance(node, fx.Node) and is_tensor(node)
            else ()
            for node in results
        ]
        return Handover(expected, told)

    @property
    def sizes_open(self) -> bool:
        """Whether the sizes of the grid, which decide the budget, are not known and stay so."""
        grid = self.found.grid
        return not self.captured.fixable and grid is not None and bool(grid.count.free_symbols)

    def batch_inputs(self) -> tuple[tuple[int, int], ...]:
        """Where the number of images can be read: pairs of input and dimension."""
        found, facts = self.found, self.facts
        if found.grid is None or not found.blocks:
            return ()
        inputs = [node for node in facts.graph.nodes if node.op == "placeholder"]
        pairs: list[tuple[int, int]] = []
        for factor in batch_factors(facts.dims(found.blocks[0].out), found.grid):
            node = factor.axis.node
            if node is not None and node in inputs:
                places = [p for p, dim in enumerate(facts.dims(node)) if factor in dim]
                pairs += [(inputs.index(node), place) for place in places]
        return tuple(pairs)

    def hint(self, size: Size) -> int:
        """A size as the number that it has for the inputs at hand."""
        return internals.size_hint(self.captured.mode, size)


def analyse(
    module: fx.GraphModule, inputs: Inputs, *, rewriting: bool = True, arrivals: Arrivals = ()
) -> Analysis:
    """Capture, normalise, label the axes, find the blocks.

    A graph that will be rewritten is compiled for the grid at hand (the batch may stay symbolic):
    budgets are shares of its tokens, and symbolic ones would end up in every guard.
    """
    analysis = _analyse(module, inputs, arrivals)
    if not rewriting or analysis.found.grid is None or not analysis.captured.fixable:
        return analysis
    symbols = analysis.found.grid.count.free_symbols
    if not symbols:
        return analysis
    internals.specialise(analysis.captured.inputs, symbols)
    return _analyse(module, inputs, arrivals)


def _analyse(module: fx.GraphModule, inputs: Inputs, arrivals: Arrivals) -> Analysis:
    held = inputs
    if not isinstance(held, GraphInputs):
        held = dynamo_inputs(module, held, arrivals)
    captured = capture(module, held, DECOMPOSITIONS)
    functionalise(captured.module.graph, captured.mode)
    return _understood(captured)


def _understood(captured: Captured) -> Analysis:
    captured.module.graph.eliminate_dead_code()
    captured.module.recompile()
    facts = label_axes(captured.module.graph, captured.constants, captured.arrived())
    return Analysis(captured, facts, find_blocks(facts))


def with_tokens_together(analysis: Analysis) -> Analysis:
    """The same with tokens that part and meet again computed with together; all sizes are numbers.

    See :mod:`tokenpass.passes.rejoin`.
    """
    captured = rejoin(analysis.captured, analysis.facts)
    return analysis if captured is None else _understood(captured)


def for_these_sizes(analysis: Analysis, module: fx.GraphModule, inputs: Inputs) -> Analysis | None:
    """The analysis of a graph in which every size, the batch too, is the number that it has now.

    ``None`` where sizes must stay symbolic.
    """
    sizes = [x for value in analysis.captured.inputs for x in internals.symbolic_sizes(value)]
    symbols = {symbol for size in sizes for symbol in expression(size).free_symbols}
    if not symbols:
        return analysis
    if not analysis.captured.fixable:
        return None
    internals.specialise(analysis.captured.inputs, symbols)
    return _analyse(module, inputs, analysis.captured.arrivals)
