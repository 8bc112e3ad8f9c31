"""Rewrite a graph so that its token-wise regions run behind gates.

Two graphs come out of one. The *full* one is the original, which also writes down what the gates
have to remember. The *incremental* one runs each region on the tokens that its gate lets through
and reads the rest from the buffers. Both take the tensors of a stream's state as inputs behind the
original ones, and write into them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from tokenpass import torch_internals as internals
from tokenpass.capture import Captured
from tokenpass.facts import Facts
from tokenpass.gates import FEWEST
from tokenpass.gating import Gating, budget
from tokenpass.passes.gate_runs import FullRun, IncrementalRun, holding
from tokenpass.passes.update_attention import AttentionUpdates
from tokenpass.state import Slot, StateTable


@dataclass(frozen=True)
class Traced:
    """A graph with fakes of its inputs."""

    module: fx.GraphModule
    inputs: tuple[Any, ...]


def gate(
    captured: Captured, facts: Facts, plan: Gating, slots: Sequence[Slot], *, full: bool
) -> Traced:
    """The full or the incremental graph of ``plan``.

    Inputs of both: those of the original, then the tensors of :func:`state_of`. The incremental
    one takes between them the numbers of :func:`~tokenpass.gating.budget` and the threshold (if the
    method has one). Outputs: those of the original; the
    incremental one adds a tensor that says whether all changes were finite and, for each gate, what
    it let through: positions ``(B, U)``, or a mask ``(B, N)`` if there is a threshold.
    """
    mode = internals.symbolic_mode()
    inputs = internals.fakes_like(mode, captured.inputs)
    extra = [] if full else _budget_inputs(plan, mode)
    with mode:
        state = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in slots]
    first, last = len(inputs), len(inputs) + len(extra)

    def run(*given: Any) -> Any:
        table = StateTable(slots, given[last:])
        if full:
            return FullRun(captured, facts, plan, table).run(given[:first])
        return IncrementalRun(captured, facts, plan, table, given[first:last]).run(given[:first])

    everything = (*inputs, *extra, *state)
    with torch.no_grad():
        module = internals.trace(run, everything, mode)
    module.graph.eliminate_dead_code()
    module.recompile()
    return Traced(module, everything)


def state_of(facts: Facts, plan: Gating) -> list[Slot]:
    """The tensors that a stream remembers, in the order in which the graphs take them."""
    slots: list[Slot] = []
    for number, region in enumerate(plan.regions):
        rows = region.layout.images * region.layout.count
        for kind, nodes in (("reference", region.inputs), ("buffer", region.outputs)):
            for place, node in enumerate(nodes):
                value = node.meta["val"]
                shape = (rows, value.numel() // rows)
                slots.append(Slot((number, kind, place), shape, value.dtype, value.device))
    for item in plan.attentions:
        slots += AttentionUpdates.slots(facts, plan, item)
    for number, node in enumerate(holding(facts.graph)):
        value = node.meta["val"]
        slots.append(Slot(("held", number), tuple(value.shape), value.dtype, value.device))
    return slots


def _budget_inputs(plan: Gating, mode: FakeTensorMode) -> list[Any]:
    """Fakes of what the incremental graph takes beside inputs and state.

    A count is traced as fewer than all tokens: an operator that asks whether it is at least that
    many would make a constant of it.
    """
    counts = budget(plan, plan.method)
    tokens = [sum(size) for size in (*plan.sizes, *plan.exchanging)][: len(counts)]
    extra: list[Any] = []
    for place, (count, total) in enumerate(zip(counts, tokens, strict=True)):
        hint = max(FEWEST, min(count, total - 1))
        extra.append(internals.symbolic_count(mode, hint, f"count_{place}"))
    if plan.method.threshold is not None:
        with mode:
            extra.append(torch.empty((), dtype=torch.float32))
    return extra
