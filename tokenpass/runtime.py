"""Pruned graphs at run time: budgets that change, and what the last call kept."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass import torch_internals as internals
from tokenpass.arrivals import Arrivals, Handover
from tokenpass.budgets import LEAST, for_flops, for_milliseconds
from tokenpass.cuts import from_outputs
from tokenpass.errors import TokenpassWarning
from tokenpass.logs import log_compilation
from tokenpass.methods import Budget, HiPrune
from tokenpass.options import Settings
from tokenpass.pipeline import Rewrite, rewrite, undone
from tokenpass.report import GraphReport
from tokenpass.sessions import Graph, Session, register
from tokenpass.timing import timed

log = logging.getLogger("tokenpass")

ROUNDS, WARM_UP = 5, 2
"""Calls that are timed for ``target_ms``, and those before them that are not."""

Run = Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """A graph compiled for one budget.

    Attributes:
        run: The compiled graph.
        report: What was done to it.
        prunes: Whether it returns kept positions after its outputs.
        handover: What it expects of its inputs, and what its outputs are.
        records: How many tensors it returns after these, which tell what each cut did.
        batch: Where the number of images can be read: pairs of input and dimension.
    """

    run: Run
    report: GraphReport
    prunes: bool
    batch: tuple[tuple[int, int], ...]
    handover: Handover
    records: int = 0

    def __call__(self, inputs: Sequence[Any]) -> tuple[Any, Tensor | None, Sequence[Tensor]]:
        """Outputs; grid positions of the patch tokens that are left, ``(B, K)``; what is told of
        the cuts.
        """
        outputs = self.run(*inputs)
        if self.prunes:
            end = len(outputs) - self.records
            *rest, kept = outputs[:end]
            return tuple(rest), kept, outputs[end:]
        if not self.report.tokens:
            return outputs, None, ()
        images = math.prod(inputs[index].shape[dim] for index, dim in self.batch)
        return outputs, torch.arange(self.report.tokens).expand(images, -1), ()


class CompiledGraph(Graph[Session]):
    """What Dynamo calls in place of a graph.

    Args:
        module: Dynamo's graph.
        settings: How to compile it.
        inputs: Example inputs.
        backend: The backend object of the ``torch.compile`` call.
        frame: The number of the frame that the graph was made of, if Dynamo made it.
        arrivals: What is known of the inputs that other graphs handed over.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        settings: Settings,
        inputs: Sequence[Any],
        backend: object | None = None,
        frame: int | None = None,
        arrivals: Arrivals = (),
    ) -> None:
        assert isinstance(settings.method, HiPrune)
        super().__init__(module, settings, inputs, Session, backend, frame)
        self._method = settings.method
        self._dynamic = any(isinstance(x, torch.SymInt) for x in inputs)
        self._variants: dict[Any, Variant] = {}
        self._arrivals = arrivals
        self._target_ms = settings.target_ms
        if settings.target_flops is not None:
            mode = internals.current_fake_mode()
            solved = for_flops(
                module,
                inputs,
                self._method,
                settings.target_flops,
                partial(internals.size_hint, mode),
            )
            assert isinstance(solved, HiPrune)
            self._method = solved
        if self._target_ms is None:
            self._first(inputs)
        register(self)

    def _first(self, inputs: Sequence[Any]) -> None:
        """Compile for the budget that was asked for."""
        rewriting = self._settings.always_rewrite or not self._method.full
        first = self._compile(self._method, inputs, rewriting=rewriting)
        if not first.report.converted and not self._method.full:
            warn_of_nothing(first.report)
        self._variants[None] = first

    def __call__(self, *inputs: Any) -> Any:
        if self._target_ms is not None:
            with self._lock:
                self._calibrate(inputs)
        session = self._sessions.of(inputs)
        variant = self._variant(session.keep, inputs)
        axes = variant.handover.axes(inputs)
        if axes is None:
            variant, axes = self._variant(session.keep, inputs, known=False), {}
        outputs, session.kept, told = variant(inputs)
        variant.handover.tell(axes, outputs)
        session.cuts = from_outputs(told, self._method.merges)
        session.report = variant.report
        session.mark()
        return outputs

    def _calibrate(self, inputs: Sequence[Any]) -> None:
        """Find the budget that a call may have by timing some, once."""
        if self._target_ms is None:
            return
        copies = [_copied(x) for x in inputs]
        tried: dict[float, Variant] = {}

        def at(keep: float) -> Variant:
            if keep not in tried:
                method = self._method.with_budget(keep)
                tried[keep] = self._compile(method, inputs, rewriting=keep < 1.0)
            return tried[keep]

        def measure(keep: float) -> float:
            with torch.no_grad(), torch.random.fork_rng():
                return 1e3 * timed(partial(at(keep), copies), ROUNDS, WARM_UP).median

        if at(LEAST).prunes:
            keep = for_milliseconds(self._target_ms, measure)
            log.info("target_ms=%g: keep=%.3f", self._target_ms, keep)
            self._method, self._variants[None] = self._method.with_budget(keep), tried[keep]
        else:
            self._first(inputs)
        self._target_ms = None

    def _variant(
        self, keep: Budget | None, inputs: Sequence[Any], *, known: bool = True
    ) -> Variant:
        """The graph for a budget; with nothing ``known`` of inputs from other graphs if asked."""
        if _same_budget(keep, self._method.keep) and not self._method.full:
            keep = None
        key: Any = None if keep is None else (type(keep), keep)
        if keep is not None and self._dynamic:
            key = (*key, *_shapes(inputs))
        if not known:
            key = ("unknown", key)
        if key not in self._variants:
            with self._lock:
                if key not in self._variants:
                    budget = self._method.keep if keep is None else keep
                    method = self._method.with_budget(budget)
                    self._variants[key] = self._compile(method, inputs, rewriting=True, known=known)
        return self._variants[key]

    def _compile(
        self, method: HiPrune, inputs: Sequence[Any], *, rewriting: bool, known: bool = True
    ) -> Variant:
        always = self._settings.always_rewrite
        record = self._settings.record_cuts
        result = rewrite(
            self._module,
            inputs,
            method,
            always=always,
            rewriting=rewriting,
            record=record,
            arrivals=self._arrivals if known else (),
        )
        if result.module is not None and result.plan is not None:
            self._log(result)
            records = (1 + method.merges) * result.plan.cut_count if record else 0
            try:
                run = self._inner(result.module, inputs)
                return Variant(run, result.report, True, (), result.handover, records)
            except Exception as error:
                if compiler_internals.steers_compilation(error):
                    raise
                result = undone(result, error)
        self._log(result)
        run = self._inner(self._module, inputs)
        return Variant(run, result.report, False, result.batch, result.handover)

    def _log(self, result: Rewrite) -> None:
        after = {"after": result.module} if result.module is not None else {}
        log_compilation(result.report, {"before": self._module, **after}, self._compilation)

    def _inner(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Run:
        return compile_inner(self._settings, module, inputs)


def _copied(value: Any) -> Any:
    """A tensor that may be written into without a trace; parameters are not written into."""
    if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
        return value.detach().clone()
    return value


def _same_budget(one: Budget | None, other: Budget) -> bool:
    """Whether two budgets are one: 1 is a token, and 1.0 all of them."""
    return type(one) is type(other) and one == other


def _shapes(inputs: Sequence[Any]) -> list[Any]:
    return [tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs]


def compile_inner(
    settings: Settings, module: fx.GraphModule, inputs: Sequence[Any], *, in_order: bool = False
) -> Run:
    """Hand a graph to the inner backend.

    See :func:`~tokenpass.compiler_torch_internals.inner_compile`.
    """
    if callable(settings.inner):
        return settings.inner(module, list(inputs))  # type: ignore[no-any-return]
    mode = settings.mode
    return compiler_internals.inner_compile(settings.inner, module, inputs, mode, in_order=in_order)


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
