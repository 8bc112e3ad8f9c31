"""What compiled graphs remember between calls, and for whom.

Dynamo lets models of one class share compiled code, so what is remembered belongs to a *session*:
one for each model, told apart by its parameters.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass.cuts import Cut
from tokenpass.methods import Budget, Method
from tokenpass.options import Settings
from tokenpass.report import GraphReport


@dataclass
class Session:
    """What one model's calls of a graph leave behind.

    Attributes:
        keep: A budget set at run time; ``None`` for the one it was compiled with.
        kept: Grid positions of the last call's surviving patch tokens, ``(B, K)``.
        cuts: What each cut of the last call did, where that is recorded.
        report: Of the variant that ran last; ``None`` before the first call.
        ran: When it ran last, counted over all graphs.
        part: Which part of the model the graph is; a graph that was compiled anew, for images of
            another size say, is the same part.
    """

    keep: Budget | None = None
    kept: Tensor | None = None
    cuts: Sequence[Cut] = ()
    report: GraphReport | None = None
    ran: int = 0
    part: object = None

    def mark(self) -> None:
        """Note that the graph runs now."""
        self.ran = next(_runs)

    def forget(self) -> None:
        """Drop what earlier calls left; the budget is the one that was compiled."""
        self.keep = self.kept = None
        self.cuts = ()

    def follow(self, other: Session) -> None:
        """Take over what was set at run time for the same part of the model."""
        self.keep = other.keep


_runs = itertools.count(1)

AnySession = TypeVar("AnySession", bound=Session)


def last_call(sessions: Iterable[Session]) -> list[Session]:
    """The sessions of the graphs that the last call of a model went through, in that order."""
    latest: dict[object, Session] = {}
    for session in sorted(sessions, key=lambda session: session.ran, reverse=True):
        if not session.ran or session.part in latest:
            break
        latest[session.part] = session
    return list(reversed(latest.values()))


class Sessions(Generic[AnySession]):
    """The sessions of one graph.

    Args:
        make: Makes a session, given the part that the graph is.
        inputs: Example inputs of the graph.
        frame: The number of the frame that the graph was made of, if Dynamo made it.
    """

    def __init__(
        self, make: Callable[[object], AnySession], inputs: Sequence[Any], frame: int | None
    ) -> None:
        self._make = make
        self._frame = frame
        self._known: Any = WeakIdKeyDictionary()
        self._anonymous = make(frame)
        parameters = (i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter))
        self._parameter = next(parameters, None)

    def of(self, inputs: Sequence[Any]) -> AnySession:
        """The session of the model whose parameters are among ``inputs``."""
        if self._parameter is None:
            return self._anonymous
        parameter = inputs[self._parameter]
        if parameter not in self._known:
            self._known[parameter] = self._make((self._frame, id(parameter)))
        return self._known[parameter]  # type: ignore[no-any-return]

    def of_model(self, model: torch.nn.Module | None) -> list[AnySession]:
        """The sessions of a model; of every model where it is not known."""
        if self._parameter is None:
            return [self._anonymous]
        if model is None:
            return list(self._known.values())
        found = compiler_internals.parameters_in_graphs(model)
        return [self._known[p] for p in found if p in self._known]


class Graph(Generic[AnySession]):
    """What Dynamo calls in place of a graph, with a session for each model.

    Args:
        module: Dynamo's graph.
        settings: How to compile it.
        inputs: Example inputs.
        kind: Of the sessions.
        backend: The backend object of the ``torch.compile`` call.
        frame: The number of the frame that the graph was made of, if Dynamo made it.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        settings: Settings,
        inputs: Sequence[Any],
        kind: type[AnySession],
        backend: object | None,
        frame: int | None,
    ) -> None:
        self.backend = backend
        self._module = module
        self._settings = settings
        self._kind = kind
        self._sessions = Sessions(self._session, inputs, frame)
        self._lock = threading.Lock()
        self._compilation = compiler_internals.compilation_id()

    @property
    def method(self) -> Method:
        """The method that the model was compiled with."""
        return self._settings.method

    def sessions(self, model: torch.nn.Module | None) -> list[AnySession]:
        """The sessions of a model; of every model where it is not known."""
        return self._sessions.of_model(model)

    def _session(self, part: object) -> AnySession:
        """A new session, with the budget that was set for the same part compiled before."""
        session = self._kind(part=part)
        for sibling in siblings(self, part)[:1]:
            session.follow(sibling)
        return session


_graphs: dict[int, weakref.ref[Any]] = {}


def register(graph: Graph[Any]) -> None:
    """Make a graph known to :func:`graphs_of`, as long as it lives."""
    number = max(_graphs, default=0) + 1

    def forget(_: object) -> None:
        _graphs.pop(number, None)

    _graphs[number] = weakref.ref(graph, forget)


def siblings(graph: Graph[Any], part: object) -> list[Session]:
    """Sessions of the same part of a model in graphs that Dynamo made for other inputs."""
    return [
        session
        for other in graphs_of(graph.backend)
        if other is not graph
        for session in other.sessions(None)
        if session.part == part
    ]


def graphs_of(backend: object) -> list[Graph[Any]]:
    """The graphs that a ``torch.compile`` call has compiled so far, in that order.

    Calls with equal options share compiled code, as they do in Dynamo.
    """
    alive = [graph for graph in (ref() for ref in list(_graphs.values())) if graph is not None]
    return [graph for graph in alive if graph.backend == backend]
