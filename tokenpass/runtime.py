"""Pruned graphs at run time: budgets that change, and what the last call kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tokenpass import torch_internals as internals
from tokenpass.errors import TokenpassWarning
from tokenpass.methods import Budget, HiPrune
from tokenpass.options import Settings
from tokenpass.pipeline import rewrite, undone
from tokenpass.report import GraphReport
from tokenpass.sessions import Graph, Session, register

Run = Callable[..., Any]


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


class CompiledGraph(Graph[Session]):
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
        assert isinstance(settings.method, HiPrune)
        super().__init__(module, settings, inputs, Session, backend, frame)
        self._method = settings.method
        rewriting = settings.always_rewrite or not self._method.full
        first = self._compile(self._method, inputs, rewriting=rewriting)
        self._dynamic = any(isinstance(x, torch.SymInt) for x in inputs)
        self._variants: dict[Any, Variant] = {None: first}
        if not first.report.converted and not self._method.full:
            warn_of_nothing(first.report)
        register(self)

    def __call__(self, *inputs: Any) -> Any:
        session = self._sessions.of(inputs)
        variant = self._variant(session.keep, inputs)
        outputs, session.kept = variant(inputs)
        session.report = variant.report
        session.mark()
        return outputs

    def _variant(self, keep: Budget | None, inputs: Sequence[Any]) -> Variant:
        if _same_budget(keep, self._method.keep) and not self._method.full:
            keep = None
        key: Any = None if keep is None else (type(keep), keep)
        if keep is not None and self._dynamic:
            key = (*key, *_shapes(inputs))
        if key not in self._variants:
            with self._lock:
                if key not in self._variants:
                    assert keep is not None
                    method = self._method.with_budget(keep)
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
        return compile_inner(self._settings, module, inputs)


def _same_budget(one: Budget | None, other: Budget) -> bool:
    """Whether two budgets are one: 1 is a token, and 1.0 all of them."""
    return type(one) is type(other) and one == other


def _shapes(inputs: Sequence[Any]) -> list[Any]:
    return [tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs]


def compile_inner(settings: Settings, module: fx.GraphModule, inputs: Sequence[Any]) -> Run:
    """Hand a graph to the inner backend."""
    if callable(settings.inner):
        return settings.inner(module, list(inputs))  # type: ignore[no-any-return]
    return internals.inner_compile(settings.inner, module, inputs, settings.mode)


def warn_of_nothing(report: GraphReport) -> None:
    """Say once that a graph is compiled as it is; where a rewrite failed, that was said already."""
    if report.failed:
        return
    reasons = dict.fromkeys(item.reason for item in report.refusals)
    detail = "; ".join(reasons) or "no attention was found"
    warnings.warn(
        f"tokenpass: nothing to convert in this graph, it is compiled as it is ({detail})",
        TokenpassWarning,
        stacklevel=2,
    )
