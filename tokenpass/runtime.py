"""Compiled graphs at run time: budgets that change, and what the last call kept.

Dynamo lets models of one class share compiled code, so what is remembered between calls belongs to
a *session*: one for each model, told apart by its parameters.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from tokenpass import torch_internals as internals
from tokenpass.errors import OptionError, TokenpassWarning
from tokenpass.methods import Budget, HiPrune
from tokenpass.options import Settings
from tokenpass.pipeline import rewrite, undone
from tokenpass.report import GraphReport

Run = Callable[..., Any]


@dataclass
class Session:
    """What one model's calls of a graph leave behind.

    Attributes:
        keep: A budget set at run time; ``None`` for the one it was compiled with.
        kept: Grid positions of the last call's surviving patch tokens, ``(B, K)``.
        report: Of the variant that ran last; ``None`` before the first call.
        ran: When it ran last, counted over all graphs.
        part: Which part of the model the graph is; a graph that was compiled anew, for images of
            another size say, is the same part.
    """

    keep: Budget | None = None
    kept: Tensor | None = None
    report: GraphReport | None = None
    ran: int = 0
    part: object = None


_runs = itertools.count(1)


def last_call(sessions: Iterable[Session]) -> list[Session]:
    """The sessions of the graphs that the last call of a model went through, in that order."""
    latest: dict[object, Session] = {}
    for session in sorted(sessions, key=lambda session: session.ran, reverse=True):
        if not session.ran or session.part in latest:
            break
        latest[session.part] = session
    return list(reversed(latest.values()))


@dataclass(frozen=True)
class Variant:
    """A graph compiled for one budget.

    Attributes:
        run: The compiled graph.
        report: What was done to it.
        prunes: Whether it returns kept positions after its outputs.
        batch: Where the number of images can be read: pairs of input and dimension.
    """

    run: Run
    report: GraphReport
    prunes: bool
    batch: tuple[tuple[int, int], ...]

    def __call__(self, inputs: Sequence[Any]) -> tuple[Any, Tensor | None]:
        """Outputs, and grid positions of the patch tokens that are left, ``(B, K)``."""
        outputs = self.run(*inputs)
        if self.prunes:
            *rest, kept = outputs
            return tuple(rest), kept
        if not self.report.tokens:
            return outputs, None
        images = math.prod(inputs[index].shape[dim] for index, dim in self.batch)
        return outputs, torch.arange(self.report.tokens).expand(images, -1)


class CompiledGraph:
    """What Dynamo calls in place of a graph.

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
        self.backend = backend
        self._frame = frame
        self._module = module
        self._settings = settings
        self._sessions: Any = WeakIdKeyDictionary()
        self._anonymous = Session(part=frame)
        self._lock = threading.Lock()
        parameters = (i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter))
        self._parameter = next(parameters, None)
        rewriting = settings.always_rewrite or not settings.method.full
        first = self._compile(settings.method, inputs, rewriting=rewriting)
        self._dynamic = any(isinstance(x, torch.SymInt) for x in inputs)
        self._variants: dict[Any, Variant] = {None: first}
        if not first.report.converted and not settings.method.full:
            _warn_of_nothing(first.report)
        _register(self)

    @property
    def method(self) -> HiPrune:
        """The method that the model was compiled with."""
        return self._settings.method

    def __call__(self, *inputs: Any) -> Any:
        session = self._session(inputs)
        variant = self._variant(session.keep, inputs)
        outputs, session.kept = variant(inputs)
        session.report = variant.report
        session.ran = next(_runs)
        return outputs

    def _session(self, inputs: Sequence[Any]) -> Session:
        """The session of the model whose parameters are among ``inputs``."""
        if self._parameter is None:
            return self._anonymous
        return self._session_of(inputs[self._parameter])

    def _session_of(self, parameter: Tensor) -> Session:
        if parameter not in self._sessions:
            self._sessions[parameter] = Session(part=(self._frame, id(parameter)))
        return self._sessions[parameter]  # type: ignore[no-any-return]

    def sessions(self, model: torch.nn.Module | None) -> list[Session]:
        """The sessions of a model; of every model where it is not known."""
        if self._parameter is None:
            return [self._anonymous]
        if model is None:
            return list(self._sessions.values())
        return [self._sessions[p] for p in model.parameters() if p in self._sessions]

    def _variant(self, keep: Budget | None, inputs: Sequence[Any]) -> Variant:
        key: Any = keep
        if keep is not None and self._dynamic:
            key = (keep, *_shapes(inputs))
        if key not in self._variants:
            with self._lock:
                if key not in self._variants:
                    assert keep is not None
                    method = with_budget(self._settings.method, keep)
                    self._variants[key] = self._compile(method, inputs, rewriting=True)
        return self._variants[key]

    def _compile(self, method: HiPrune, inputs: Sequence[Any], *, rewriting: bool) -> Variant:
        always = self._settings.always_rewrite
        result = rewrite(self._module, inputs, method, always=always, rewriting=rewriting)
        if result.module is not None:
            try:
                run = self._inner(result.module, inputs)
                return Variant(run, result.report, True, ())
            except Exception as error:
                if internals.steers_compilation(error):
                    raise
                result = undone(result, error)
        run = self._inner(self._module, inputs)
        return Variant(run, result.report, False, result.batch)

    def _inner(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Run:
        inner = self._settings.inner
        if callable(inner):
            return inner(module, list(inputs))  # type: ignore[no-any-return]
        return internals.inner_compile(inner, module, inputs, self._settings.mode)


_graphs: dict[int, weakref.ref[CompiledGraph]] = {}


def _register(graph: CompiledGraph) -> None:
    number = max(_graphs, default=0) + 1
    _graphs[number] = weakref.ref(graph, lambda _: _graphs.pop(number, None) and None)


def graphs_of(backend: object) -> list[CompiledGraph]:
    """The graphs that a ``torch.compile`` call has compiled so far, in that order.

    Calls with equal options share compiled code, as they do in Dynamo.
    """
    alive = [graph for graph in (ref() for ref in list(_graphs.values())) if graph is not None]
    return [graph for graph in alive if graph.backend == backend]


def _shapes(inputs: Sequence[Any]) -> list[Any]:
    return [tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs]


def _warn_of_nothing(report: GraphReport) -> None:
    reasons = dict.fromkeys(item.reason for item in report.refusals)
    if any("undone" in reason for reason in reasons):
        return
    detail = "; ".join(reasons) or "no attention was found"
    warnings.warn(
        f"tokenpass: nothing to convert in this graph, it is compiled as it is ({detail})",
        TokenpassWarning,
        stacklevel=2,
    )


def with_budget(method: HiPrune, keep: Budget) -> HiPrune:
    """``method`` with another final budget; a schedule of its own keeps its proportions.

    Raises:
        OptionError: If the schedule counts tokens, so that its proportions are not known.
    """
    if method.stages is None:
        return replace(method, keep=keep)
    shares = [share for _, share in method.stages]
    if not all(isinstance(share, float) for share in (keep, *shares)) or shares[-1] == 1.0:
        raise OptionError(
            f"keep={keep!r} cannot be derived from stages={method.stages!r}: "
            "compile with other stages"
        )
    power = math.log(keep) / math.log(shares[-1])
    stages = tuple((layer, share**power) for layer, share in method.stages)
    return replace(method, keep=stages[-1][1], stages=stages)
