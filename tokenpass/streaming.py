"""Gated graphs at run time: one state for each stream, budgets that change from frame to frame."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass import torch_internals as internals
from tokenpass.arrivals import Handover, arrivals_of
from tokenpass.budgets import for_flops
from tokenpass.errors import TokenpassError, TokenpassWarning
from tokenpass.gated import Gated
from tokenpass.gating import budget
from tokenpass.logs import log, log_compilation
from tokenpass.methods import Eventful
from tokenpass.options import Settings
from tokenpass.passes.gate import Traced
from tokenpass.pipeline import failed
from tokenpass.prune_and_gate import Both, prune_and_gate
from tokenpass.runtime import Run, compile_inner, warn_of_nothing
from tokenpass.scenes import SceneWatch
from tokenpass.sessions import Graph, register, siblings
from tokenpass.state import Slot, fresh_state
from tokenpass.streams import NOTHING_LEFT, Frame, Signature, Stream, StreamSession

DEFAULT_STREAM = "default"

SCENE_CUT = "scene cut"

_stream: contextvars.ContextVar[Mapping[int, str]] = contextvars.ContextVar("stream")


@contextlib.contextmanager
def streaming_to(backend: object, name: str) -> Iterator[None]:
    """Calls inside, in this thread, use the state of stream ``name``."""
    token = _stream.set({**_stream.get({}), id(backend): name})
    try:
        yield
    finally:
        _stream.reset(token)


@dataclass(frozen=True)
class Compiled:
    """The graphs for one signature.

    Attributes:
        gated: What they are made of.
        full: Computes everything.
        incremental: Computes what passes the gates; ``None`` if nothing is gated.
        prunes: Whether they return kept positions as well.
        remembers: Whether ``full`` writes down what the gates need. Where it is the graph as it
            was, the first frame behind gates is one that all tokens pass.
    """

    gated: Gated
    full: Run
    incremental: Run | None
    prunes: bool = False
    remembers: bool = True


class GatedGraph(Graph[StreamSession]):
    """What Dynamo calls in place of a graph.

    Everything is compiled for the shapes of the first frame that has them.

    Args:
        module: Dynamo's graph.
        settings: How to compile it.
        inputs: Example inputs.
        backend: The backend object of the ``torch.compile`` call.
        frame: The number of the frame that the graph was made of, if Dynamo made it.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        settings: Settings,
        inputs: Sequence[Any],
        backend: object | None = None,
        frame: int | None = None,
    ) -> None:
        assert isinstance(settings.method, Eventful)
        super().__init__(module, settings, inputs, StreamSession, backend, frame)
        self._method = settings.method
        self._constants = frozenset(
            i
            for i, (n, x) in enumerate(
                zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True)
            )
            if internals.is_model_state(n, x)
        )
        self._compiled: dict[Signature, Compiled] = {}
        register(self)

    def __call__(self, *inputs: Any) -> Any:
        _refuse_gradients(inputs)
        session = self._sessions.of(inputs)
        frames = [x for i, x in enumerate(inputs) if i not in self._constants]
        stream = self._stream(session)
        with stream.lock:
            outputs, handover = self._run(session, stream, inputs, frames)
        handover.tell(handover.axes(inputs), outputs)
        session.last = stream
        session.mark()
        return outputs

    # ------------------------------------------------------------ streams

    def _stream(self, session: StreamSession) -> Stream:
        name = _stream.get({}).get(id(self.backend), DEFAULT_STREAM)
        with self._lock:
            if name not in session.streams:
                for sibling in siblings(self, session.part):
                    if isinstance(sibling, StreamSession) and name in sibling.streams:
                        session.streams[name] = sibling.streams.pop(name)
            stream = session.streams.setdefault(name, Stream())
            session.streams.move_to_end(name)
            while len(session.streams) > self._method.max_streams:
                gone, _ = session.streams.popitem(last=False)
                warnings.warn(
                    f"tokenpass: more than {self._method.max_streams} streams; the state of "
                    f"{gone!r}, least recently used, is dropped (max_streams keeps more)",
                    TokenpassWarning,
                    stacklevel=2,
                )
        return stream

    def _run(
        self, session: StreamSession, stream: Stream, inputs: Sequence[Any], frames: Sequence[Any]
    ) -> tuple[Any, Handover]:
        signature = tuple(_kind(x) for x in frames)
        compiled = self._variant(signature, inputs)
        session.report = compiled.gated.report
        if compiled.incremental is None:
            stream.frame = Frame(compiled.gated, True, why="nothing is gated")
            return self._kept(session, compiled, compiled.full(*inputs))
        if stream.signature != signature or not _fits(stream.state, compiled.gated.slots):
            self._begin(stream, signature, compiled)
        method = self._current(session)
        why = self._why_full(stream, frames, method)
        if why:
            log.debug("frame computed in full: %s", why)
        dense = compiled.remembers or self._is_left_alone(method) or why == SCENE_CUT
        if why and dense:
            state = stream.state if compiled.remembers else ()
            outputs = compiled.full(*inputs, *state)
            stream.frame, stream.finite = Frame(compiled.gated, True, why=why), None
            stream.fresh = "" if compiled.remembers else NOTHING_LEFT
            return self._kept(session, compiled, outputs)
        if why:
            method = replace(method, keep=1.0)
            for x in stream.state:
                x.zero_()
        budget = self._budget(method, compiled.gated)
        outputs = compiled.incremental(*inputs, *budget, *stream.state)
        outputs, rows = self._split(compiled.gated, outputs)
        stream.finite, *passed = rows
        stream.frame, stream.fresh = Frame(compiled.gated, False, passed, why), ""
        return self._kept(session, compiled, outputs)

    @staticmethod
    def _kept(session: StreamSession, compiled: Compiled, outputs: Any) -> tuple[Any, Handover]:
        """The original's outputs, and what they are; what else a pruned graph returns is
        remembered."""
        if not compiled.prunes:
            return outputs, compiled.gated.handover
        *rest, positions = outputs
        session.kept = positions.sort(dim=1).values
        return tuple(rest), Handover()

    def _begin(self, stream: Stream, signature: Signature, compiled: Compiled) -> None:
        if stream.signature:
            stream.fresh = f"frames changed from {stream.signature} to {signature}"
            log.info("stream starts afresh: %s", stream.fresh)
        stream.signature = signature
        stream.state = fresh_state(compiled.gated.slots)
        stream.scenes = SceneWatch()

    def _why_full(self, stream: Stream, frames: Sequence[Any], method: Eventful) -> str:
        """Why a frame is to be computed in full; empty if it is not."""
        cut = stream.scenes.cut(frames, self._method.cut_share)
        alone = self._is_left_alone(method)
        if stream.fresh and not (alone and stream.fresh == NOTHING_LEFT):
            return stream.fresh
        if stream.finite is not None and not bool(stream.finite):
            return "the last frame was not finite"
        if alone:
            return "full budget"
        return SCENE_CUT if cut else ""

    def _is_left_alone(self, method: Eventful) -> bool:
        """Whether all tokens would pass the gates, so that there need be none."""
        return method.full and not self._settings.always_rewrite

    def _current(self, session: StreamSession) -> Eventful:
        """The method with the budget that was set at run time."""
        keep = self._method.keep if session.keep is None else session.keep
        threshold = self._method.threshold if session.threshold is None else session.threshold
        return replace(self._method, keep=keep, threshold=threshold)

    @staticmethod
    def _budget(method: Eventful, gated: Gated) -> list[Any]:
        """What the incremental graph takes beside frame and state."""
        assert gated.plan is not None
        given: list[Any] = [*budget(gated.plan, method)]
        if method.threshold is not None:
            given.append(torch.tensor(method.threshold, dtype=torch.float32))
        return given

    @staticmethod
    def _split(gated: Gated, outputs: Any) -> tuple[Any, Sequence[Tensor]]:
        """The original's outputs, and what the gates say."""
        assert gated.plan is not None
        extra = 1 + len(gated.plan.regions)
        return tuple(outputs[:-extra]), outputs[-extra:]

    # ------------------------------------------------------------ compiling

    def _variant(self, signature: Signature, inputs: Sequence[Any]) -> Compiled:
        if signature not in self._compiled:
            with self._lock:
                if signature not in self._compiled:
                    self._compiled[signature] = self._compile(inputs)
        return self._compiled[signature]

    def _compile(self, inputs: Sequence[Any]) -> Compiled:
        always, share = self._settings.always_rewrite, self._settings.target_flops
        with torch.inference_mode(False), torch.no_grad():
            if share is not None:
                solved = for_flops(self._module, inputs, self._method, share, int)
                assert isinstance(solved, Eventful)
                self._method = solved
            pruning = self._settings.pruning
            arrivals = arrivals_of(inputs)
            both = prune_and_gate(
                self._module, inputs, pruning, self._method, always=always, arrivals=arrivals
            )
            gated = both.gated
            if gated.full is not None and gated.incremental is not None:
                self._log(gated)
                try:
                    return self._both(both, gated.full, gated.incremental, inputs)
                except Exception as error:
                    if compiler_internals.steers_compilation(error):
                        raise
                    gated = Gated(failed(gated.report, error), handover=gated.handover)
                    both = Both(gated, self._module, False)
            if not both.prunes:
                warn_of_nothing(gated.report)
            self._log(gated)
            whole = compile_inner(self._settings, both.module, inputs)
            return Compiled(replace(gated, flops_full=None), whole, None, both.prunes)

    def _both(
        self, both: Both, full: Traced, incremental: Traced, inputs: Sequence[Any]
    ) -> Compiled:
        """The full and the incremental graph. At full budget the full one is the model itself,
        which no state slows down."""

        def compiled(graph: Traced) -> Run:
            return compile_inner(self._settings, graph.module, graph.inputs, in_order=True)

        if both.prunes or not self._is_left_alone(self._method):
            return Compiled(both.gated, compiled(full), compiled(incremental), both.prunes)
        whole = compile_inner(self._settings, both.module, inputs)
        return Compiled(both.gated, whole, compiled(incremental), remembers=False)

    def _log(self, gated: Gated) -> None:
        traced = {"full": gated.full, "incremental": gated.incremental}
        after = {name: graph.module for name, graph in traced.items() if graph is not None}
        log_compilation(gated.report, {"before": self._module, **after}, self._compilation)


def _fits(state: Sequence[Tensor], slots: Sequence[Slot]) -> bool:
    """Whether state, of another graph maybe, has the shapes and dtypes that a graph writes."""
    return len(state) == len(slots) and all(
        (tuple(x.shape), x.dtype, x.device) == (s.shape, s.dtype, s.device)
        for x, s in zip(state, slots, strict=True)
    )


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    return value


def _refuse_gradients(inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise TokenpassError(
            "eventful gating remembers values from frame to frame and has no gradient: run the "
            "model under torch.no_grad() or torch.inference_mode(), or freeze its parameters"
        )
