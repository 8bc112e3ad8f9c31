"""Questions to a compiled model, and its budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, overload

from torch import Tensor

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass.answering import Answering
from tokenpass.cuts import Cut
from tokenpass.errors import NothingRecordedError, OptionError
from tokenpass.methods import Budget, HiPrune, Method, check_budget, check_threshold
from tokenpass.report import GraphReport, Report
from tokenpass.sessions import Graph, Session, graphs_of, last_call
from tokenpass.streaming import DEFAULT_STREAM, streaming_to
from tokenpass.streams import StreamSession


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
        update_rates: Share of the tokens that each gate let through, in execution order; empty for
            pruning.
        selected: For each gate the tokens that it let through, ``(B, N)``, bool.
        operations: Multiply-adds of the frame in the categories of the published Eventful
            Transformers: ``"linear"``, ``"matmul"``, ``"gate"``, ``"accumulator"``.
        state_bytes: Memory that is kept between calls, of all streams.
        computed_in_full: Why the graphs with gates computed the last frame in full; empty if they
            did not.
    """

    blocks: Sequence[BlockStats]
    flops: int
    flops_before: int
    update_rates: Sequence[float] = ()
    selected: Sequence[Tensor] = ()
    operations: Mapping[str, int] = field(default_factory=dict)
    state_bytes: int = 0
    computed_in_full: str = ""

    @property
    def flops_saved(self) -> int:
        return self.flops_before - self.flops


@overload
def kept(compiled: Answering) -> list[Tensor]: ...


@overload
def kept(compiled: Any) -> Tensor: ...


def kept(compiled: Any) -> Tensor | list[Tensor]:
    """Patch tokens that survived the last call.

    Args:
        compiled: What ``torch.compile(..., backend="tokenpass")`` or ``tokenpass.vlm`` returned.

    Returns:
        ``(batch, kept)``, int64: positions on the grid, ascending. Of a vision-language model, for
        each image the visual tokens that stayed, ``(kept,)``.

    Raises:
        NothingRecordedError: If the model has not run, or has no patch tokens.
    """
    if isinstance(compiled, Answering):
        return compiled.kept()
    found = [session.kept for session in _last_call(compiled) if session.kept is not None]
    if not found:
        raise NothingRecordedError(
            "no patch tokens are known of the last call: tokenpass.report shows what was refused"
        )
    return found[-1].clone()


def cuts(compiled: Any) -> list[Cut]:
    """What each cut of the last call did: which tokens it left, and where the others went.

    Args:
        compiled: A model compiled with ``options={"record_cuts": True, ...}``.

    Raises:
        NothingRecordedError: If the model has not run, or was compiled without.
    """
    found = [cut for session in _last_call(compiled) for cut in session.cuts]
    if not found:
        raise NothingRecordedError(
            "no cuts are known of the last call: compile with record_cuts=True and call the model"
        )
    return found


def report(compiled: Any) -> Report:
    """What the last call of a compiled model went through, graph by graph.

    Raises:
        NothingRecordedError: If the model has not run.
    """
    return Report(_reports(compiled))


@overload
def stats(compiled: Answering) -> Any: ...


@overload
def stats(compiled: Any) -> Stats: ...


def stats(compiled: Any) -> Any:
    """Tokens at each block and FLOPs of the last call.

    Args:
        compiled: What ``torch.compile(..., backend="tokenpass")`` or ``tokenpass.vlm`` returned.

    Returns:
        :class:`Stats`; of a vision-language model :class:`tokenpass.vlm_cost.PromptStats`.

    Raises:
        NothingRecordedError: If the model has not run.
    """
    if isinstance(compiled, Answering):
        return compiled.stats()
    sessions = _last_call(compiled)
    reports = [session.report for session in sessions if session.report is not None]
    frames = [s.last.frame for s in sessions if isinstance(s, StreamSession) and s.last is not None]
    ran = [frame for frame in frames if frame is not None]
    with_gates = [frame for frame in ran if frame.update_rates] or ran
    before = sum(item.flops_before for item in reports)
    return Stats(
        blocks=[BlockStats(row.tokens_in, row.tokens_out) for r in reports for row in r.blocks],
        flops=sum(f.flops for f in ran) if ran else sum(item.flops for item in reports),
        flops_before=before,
        update_rates=[rate for frame in ran for rate in frame.update_rates],
        selected=[mask for frame in ran for mask in frame.selected],
        operations=_added(frame.operations for frame in ran),
        state_bytes=sum(s.state_bytes for s in sessions if isinstance(s, StreamSession)),
        computed_in_full="; ".join(dict.fromkeys(frame.why for frame in with_gates if frame.why)),
    )


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def set_budget(
    compiled: Any, *, keep: Budget | None = None, threshold: float | None = None
) -> None:
    """Change the budget; the next call uses it, without recompilation by Dynamo.

    A pruning budget that was not used before is prepared in that call and kept from then on; that
    of gates is a number which the compiled graph takes.

    Args:
        compiled: What ``torch.compile(..., backend="tokenpass")`` returned, after a first call; or
            what ``tokenpass.vlm`` returned.
        keep: Share of the patch tokens (float) or their number (int).
        threshold: Norm of a change that passes a gate; for models compiled with a threshold.

    Raises:
        OptionError: If a value is none of these, contradicts a schedule, or is of a kind that the
            model was not compiled with.
        NothingRecordedError: If the model has not run.
    """
    if keep is None and threshold is None:
        raise OptionError("keep=None, threshold=None: pass one of them")
    if keep is not None:
        check_budget("keep", keep)
    check_threshold(threshold)
    if isinstance(compiled, Answering):
        if keep is None or threshold is not None:
            raise OptionError("threshold: pruning has no threshold; pass keep")
        compiled.set_budget(keep)
        return
    sessions = _sessions(compiled)
    for graph, _ in sessions:
        _check_kind(graph.method, keep, threshold)
    for _, session in sessions:
        session.keep = session.keep if keep is None else keep
        if isinstance(session, StreamSession) and threshold is not None:
            session.threshold = threshold


def state_dict(compiled: Any, name: str = DEFAULT_STREAM) -> dict[str, Any]:
    """What a stream remembers, to be saved or moved: tensors are copies.

    Args:
        compiled: A model compiled with eventful gating; has run before.
        name: Of the stream.

    Raises:
        NothingRecordedError: If the model, or the stream, has not run.
    """
    sessions = [s for _, s in _sessions(compiled) if isinstance(s, StreamSession)]
    having = [session for session in sessions if name in session.streams]
    if not having:
        known = dict.fromkeys(repr(key) for session in sessions for key in session.streams)
        raise NothingRecordedError(f"no stream {name!r}: there are {', '.join(known) or 'none'}")
    return {str(number): session.export(name) for number, session in enumerate(having)}


def load_state_dict(compiled: Any, state: Mapping[str, Any], name: str = DEFAULT_STREAM) -> None:
    """Continue a stream from :func:`state_dict`, here or in another process.

    Args:
        compiled: The same model, compiled with the same method; has run on any frame before, of
            the shape that the stream continues with.
        state: From :func:`state_dict`.
        name: Of the stream that continues.

    Raises:
        OptionError: If the state is of a model with other graphs.
        NothingRecordedError: If the model has not run.
    """
    sessions = [session for session in _last_call(compiled) if isinstance(session, StreamSession)]
    if len(state) != len(sessions):
        raise OptionError(f"state of {len(state)} graphs: the model has {len(sessions)}")
    for number, session in enumerate(sessions):
        session.restore(name, state[str(number)])


def _check_kind(method: Method, keep: Budget | None, threshold: float | None) -> None:
    """Raise :class:`OptionError` unless a method was compiled with budgets of these kinds."""
    if isinstance(method, HiPrune):
        if threshold is not None:
            raise OptionError("threshold: pruning has no threshold; pass keep")
        if keep is not None:
            method.with_budget(keep)
        return
    for name, value in (("keep", keep), ("threshold", threshold)):
        if value is not None and getattr(method, name) is None:
            raise OptionError(
                f"{name}={value!r}: the model was compiled without {name}; compile it with "
                f"Eventful({name}=...) to change that from frame to frame"
            )


def reset(compiled: Any) -> None:
    """Forget what is remembered of earlier calls; budgets go back to what was compiled.

    The next frame of every stream is computed in full.

    Raises:
        NothingRecordedError: If the model has not run.
    """
    if isinstance(compiled, Answering):
        compiled.reset()
        return
    for _, session in _sessions(compiled):
        session.forget()


def stream(compiled: Any, name: str) -> AbstractContextManager[None]:
    """Calls inside the context, in this thread, have a state of their own.

    Args:
        compiled: What ``torch.compile(..., backend="tokenpass")`` returned.
        name: Of the stream; the same name finds the same state again.

    Raises:
        NothingRecordedError: If ``compiled`` is no compiled model.
    """
    return streaming_to(_backend(compiled), name)


def _reports(compiled: Any) -> list[GraphReport]:
    return [session.report for session in _last_call(compiled) if session.report is not None]


def _last_call(compiled: Any) -> list[Session]:
    return last_call(session for _, session in _sessions(compiled))


def _backend(compiled: Any) -> object:
    backend = compiler_internals.backend_of(compiled)
    if backend is None:
        raise NothingRecordedError(
            f"{type(compiled).__name__} is not a compiled model: pass what "
            'torch.compile(model, backend="tokenpass") returned'
        )
    return backend


def _sessions(compiled: Any) -> list[tuple[Graph[Any], Session]]:
    model = compiler_internals.original_module(compiled)
    graphs = graphs_of(_backend(compiled))
    found = [(graph, session) for graph in graphs for session in graph.sessions(model)]
    if not found:
        raise NothingRecordedError(
            "the model has not run under tokenpass yet: call it once, then ask again"
        )
    return found
