"""The steps of eventful gating: from Dynamo's graph to a full and an incremental one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass.analysis import Analysis, Inputs, analyse, with_tokens_together
from tokenpass.arrivals import Arrivals, Handover
from tokenpass.blocks import NoMatch
from tokenpass.errors import OptionError
from tokenpass.gating import Gating, gateable, passing, passing_counts
from tokenpass.methods import Eventful
from tokenpass.passes.check import check_gated
from tokenpass.passes.gate import Traced, gate, state_of
from tokenpass.passes.gate_cost import Operations, gated_cost, operations, update_symbols
from tokenpass.passes.plan_gating import plan_gating
from tokenpass.pipeline import base_report, given_up, refusal_of, refused
from tokenpass.report import BlockReport, GraphReport
from tokenpass.state import Slot


@dataclass(frozen=True)
class Gated:
    """What eventful gating makes of a graph.

    Attributes:
        report: For the user.
        plan: The gates; ``None`` where the original stays.
        full: The original graph, which also fills the state.
        incremental: The graph that computes what the gates let through.
        slots: The tensors of a stream's state.
        operations: Multiply-adds of a frame, from the rows that each gate let through.
        flops_full: Floating-point operations of a frame in full; ``None`` for the report's.
        handover: What the graph takes from other graphs, and tells them.
    """

    report: GraphReport
    plan: Gating | None = None
    full: Traced | None = None
    incremental: Traced | None = None
    slots: Sequence[Slot] = ()
    operations: Operations = field(default_factory=Operations)
    flops_full: int | None = None
    handover: Handover = field(default_factory=Handover)


def plan_gates(analysis: Analysis, method: Eventful, *, always: bool) -> Gated:
    """Decide what to do and predict its cost; rewrite nothing.

    Args:
        analysis: Of the graph.
        method: What was asked for.
        always: Gate a region even if its gate costs more than it saves.
    """
    report = base_report(analysis)
    facts, constants = analysis.facts, analysis.captured.constants
    plan = plan_gating(facts, analysis.found, constants, method, always=always)
    if isinstance(plan, NoMatch):
        return Gated(refused(report, refusal_of(plan)))
    counts = [*passing_counts(plan, method).values()]
    work = operations(facts, plan)
    cost = gated_cost(plan, work, counts)
    return Gated(
        replace(
            report,
            converted=always or not method.full,
            mlps=plan.mlps,
            blocks=_block_reports(plan),
            refusals=[refusal_of(miss) for miss in plan.misses],
            cost=cost,
            flops=int(cost.subs(dict(zip(update_symbols(plan), counts, strict=True)))),
        ),
        plan,
        operations=work,
        flops_full=report.flops_before,
    )


def _block_reports(plan: Gating) -> list[BlockReport]:
    rows: list[BlockReport] = []
    region_of = {node: region for region in plan.regions for node in region.nodes}
    for block in plan.blocks:
        region = next(region_of[node] for node in gateable(block) if node in region_of)
        updated = passing(plan.method, region.patches)
        rows.append(BlockReport(block, region.patches, region.patches, updated))
    return rows


def gate_planner(
    module: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[[Eventful], GraphReport]:
    """What gates with other budgets would do to a graph, which is analysed once."""
    analysis = with_tokens_together(analyse(module, inputs))
    return lambda method: plan_gates(analysis, method, always=False).report


def gate_graph(
    module: fx.GraphModule,
    inputs: Inputs,
    method: Eventful,
    *,
    always: bool,
    dry: bool = False,
    arrivals: Arrivals = (),
) -> Gated:
    """Analyse, plan, rewrite and check.

    Whatever fails in here leaves the original in place and says so.

    Args:
        module: Dynamo's graph.
        inputs: Its inputs; all sizes are numbers.
        method: What was asked for.
        always: Gate a region even if its gate costs more than it saves.
        dry: Only plan.
        arrivals: What is known of the inputs that other graphs handed over.

    Raises:
        OptionError: If the method does not fit the model.
    """
    planned = Gated(GraphReport())
    try:
        analysis = with_tokens_together(analyse(module, inputs, arrivals=arrivals))
        planned = plan_gates(analysis, method, always=always)
        planned = replace(planned, handover=analysis.handover())
        if planned.plan is None or dry:
            return planned
        captured, facts, plan = analysis.captured, analysis.facts, planned.plan
        slots = state_of(facts, plan)
        full, incremental = (gate(captured, facts, plan, slots, full=f) for f in (True, False))
        check_gated(captured, full, incremental)
    except Exception as error:
        if isinstance(error, OptionError) or compiler_internals.steers_compilation(error):
            raise
        return Gated(given_up(planned.report, error), handover=planned.handover)
    return replace(planned, full=full, incremental=incremental, slots=slots)
