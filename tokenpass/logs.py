"""What a compilation says, where PyTorch's users look: the log "tokenpass" and TORCH_TRACE.

``TORCH_LOGS=tokenpass`` prints one line for each compiled graph, ``TORCH_LOGS=+tokenpass`` the
graphs too; Python's ``logging`` does as well. ``TORCH_TRACE=folder`` and ``TORCH_COMPILE_DEBUG=1``
write the report and the graphs as artifacts that tlparse shows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

from torch import fx

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass.report import GraphReport, Report

log = logging.getLogger("tokenpass")


def log_compilation(
    report: GraphReport,
    graphs: Mapping[str, fx.GraphModule],
    compilation: compiler_internals.Compilation | None,
) -> None:
    """Say what was made of a graph.

    Args:
        report: Of the graph.
        graphs: Dynamo's graph and what it was rewritten into, by what they are.
        compilation: Dynamo's, which may be over.
    """
    log.info("%s", summary(report))
    compiler_internals.trace_artifact(
        "tokenpass_report", lambda: str(Report((report,))), compilation
    )
    for name, module in graphs.items():
        text = partial(_readable, module)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("graph, %s:\n%s", name, text())
        compiler_internals.trace_artifact(f"tokenpass_graph_{name}", text, compilation)


def summary(report: GraphReport) -> str:
    """One line: blocks that change, cost, refusals, patch tokens."""
    share = report.flops / report.flops_before if report.flops_before else 1.0
    refusals = len(report.refusals)
    return (
        f"{report.changed}/{len(report.blocks)} blocks, {share:.2f} of the FLOPs, "
        f"{refusals} refusal{'' if refusals == 1 else 's'}; "
        f"patch tokens: {report.tokens} in, {report.kept} out"
    )


def _readable(module: fx.GraphModule) -> str:
    return module.print_readable(print_output=False)
