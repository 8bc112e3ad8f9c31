"""Questions to a compiled model, and its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenpass import torch_internals as internals
from tokenpass.errors import NothingRecordedError
from tokenpass.methods import Budget, check_budget
from tokenpass.report import GraphReport, Report
from tokenpass.runtime import CompiledGraph, Session, graphs_of, last_call, with_budget


@dataclass(frozen=True)
class BlockStats:
    """Patch tokens of an image that a block computed on, and that it left."""

    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Stats:
    """What the last call of a compiled model cost.

    Attributes:
        blocks: In execution order.
        flops: Floating-point operations of a call; ``flops_before`` without the rewrite.
        update_rates: Shares of tokens that gates let through; empty for pruning.
        state_bytes: Memory that is kept between calls.
    """

    blocks: Sequence[BlockStats]
    flops: int
    flops_before: int
    update_rates: Sequence[float] = ()
    state_bytes: int = 0

    @property
    def flops_saved(self) -> int:
        return self.flops_before - self.flops


def kept(compiled: Any) -> Tensor:
    """Patch tokens that survived the last call.

    Args:
        compiled: What ``torch.compile(..., backend="tokenpass")`` returned.

    Returns:
        ``(batch, kept)``, int64: positions on the grid, ascending.

    Raises:
        NothingRecordedError: If the model has not run, or has no patch tokens.
    """
    found = [session.kept for session in _last_call(compiled) if session.kept is not None]
    if not found:
        raise NothingRecordedError(
            "no patch tokens are known of the last call: tokenpass.report shows what was refused"
        )
    return found[-1].clone()


def report(compiled: Any) -> Report:
    """What the last call of a compiled model went through, graph by graph.

    Raises:
        NothingRecordedError: If the model has not run.
    """
    return Report(_reports(compiled))


def stats(compiled: Any) -> Stats:
    """Tokens at each block and FLOPs of the last call.

    Raises:
        NothingRecordedError: If the model has not run.
    """
    reports = _reports(compiled)
    return Stats(
        blocks=[BlockStats(row.tokens_in, row.tokens_out) for r in reports for row in r.blocks],
        flops=sum(item.flops for item in reports),
        flops_before=sum(item.flops_before for item in reports),
    )


def set_budget(compiled: Any, *, keep: Budget) -> None:
    """Change the budget; the next call uses it, without recompilation by Dynamo.

    A budget that was not used before is prepared in that call and kept from then on.

    Args:
        compiled: What ``torch.compile(..., backend="tokenpass")`` returned; has run before.
        keep: Share of the patch tokens (float) or their number (int).

    Raises:
        OptionError: If it is neither, or contradicts a schedule.
        NothingRecordedError: If the model has not run.
    """
    check_budget("keep", keep)
    for graph, session in _sessions(compiled):
        with_budget(graph.method, keep)
        session.keep = keep


def reset(compiled: Any) -> None:
    """Forget what is remembered of earlier calls; budgets go back to what was compiled.

    Raises:
        NothingRecordedError: If the model has not run.
    """
    for _, session in _sessions(compiled):
        session.keep = session.kept = None


def _reports(compiled: Any) -> list[GraphReport]:
    return [session.report for session in _last_call(compiled) if session.report is not None]


def _last_call(compiled: Any) -> list[Session]:
    return last_call(session for _, session in _sessions(compiled))


def _sessions(compiled: Any) -> list[tuple[CompiledGraph, Session]]:
    backend = internals.backend_of(compiled)
    if backend is None:
        raise NothingRecordedError(
            f"{type(compiled).__name__} is not a compiled model: pass what "
            'torch.compile(model, backend="tokenpass") returned'
        )
    model = internals.original_module(compiled)
    graphs = graphs_of(backend)
    found = [(graph, session) for graph in graphs for session in graph.sessions(model)]
    if not found:
        raise NothingRecordedError(
            "the model has not run under tokenpass yet: call it once, then ask again"
        )
    return found
