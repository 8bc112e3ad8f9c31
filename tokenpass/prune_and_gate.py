"""Pruning and gating of one graph: of a video, tokens are left out, and of those that are left only
what changed is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from tokenpass.arrivals import Arrivals
from tokenpass.gated import Gated, gate_graph
from tokenpass.methods import Eventful, HiPrune
from tokenpass.pipeline import rewrite


@dataclass(frozen=True)
class Both:
    """What became of a graph.

    Attributes:
        gated: Gates of the pruned graph, or of the original where nothing was pruned.
        module: The graph without gates.
        prunes: Whether it returns kept positions after its outputs, as do the gated ones.
    """

    gated: Gated
    module: fx.GraphModule
    prunes: bool


def prune_and_gate(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    pruning: HiPrune | None,
    method: Eventful,
    *,
    always: bool,
    arrivals: Arrivals = (),
) -> Both:
    """Prune a graph if that is asked for, then gate what comes of it.

    Args:
        module: Dynamo's graph.
        inputs: Its inputs; all sizes are numbers.
        pruning: Which tokens leave; ``None`` if none do.
        method: The gates.
        always: Prune and gate even where it costs more than it saves.
        arrivals: What is known of the inputs that other graphs handed over; what is pruned must
            not depend on it.
    """
    if pruning is None:
        gated = gate_graph(module, inputs, method, always=always, arrivals=arrivals)
        return Both(gated, module, False)
    pruned = rewrite(module, inputs, pruning, always=always, steady=True)
    left = module if pruned.module is None else pruned.module
    gated = gate_graph(left, inputs, method, always=always)
    if pruned.module is None:
        report = replace(gated.report, refusals=[*pruned.report.refusals, *gated.report.refusals])
        return Both(replace(gated, report=report), module, False)
    done = gated.report if gated.plan is not None else pruned.report
    report = replace(
        done,
        converted=True,
        tokens=pruned.report.tokens,
        flops_before=pruned.report.flops_before,
        refusals=[*pruned.report.refusals, *gated.report.refusals],
        failed=pruned.report.failed or gated.report.failed,
    )
    return Both(replace(gated, report=report), left, True)
