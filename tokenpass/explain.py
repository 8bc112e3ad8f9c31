"""Look before compiling: what would be found and done in a model."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass import torch_internals as internals
from tokenpass.budgets import for_flops
from tokenpass.calibration import Calibration, calibrated
from tokenpass.errors import OptionError, TokenpassError
from tokenpass.export import planned
from tokenpass.gated import gate_graph
from tokenpass.methods import Eventful, HiPrune, Method
from tokenpass.pipeline import rewrite
from tokenpass.report import GraphReport, Refusal, Report


def explain(
    model: Callable[..., Any] | ExportedProgram,
    *args: Any,
    method: Method | None = None,
    **kwargs: Any,
) -> Report:
    """Plan a method on a model; compile nothing.

    The model runs once with the given inputs, in eager mode, so that Dynamo can trace it; an
    exported program does not run.

    Args:
        model: A module or a function; a compiled one is explained as it was before. Or a program
            of ``torch.export``, which has its example inputs.
        *args: Its inputs.
        method: What to plan; default ``HiPrune()``.
        **kwargs: More inputs.

    Returns:
        Blocks, tokens, cost and refusals over all graphs that Dynamo makes of the model.

    Raises:
        OptionError: If the method does not fit the model.
        TokenpassError: If Dynamo captures no graph at all.
    """
    if isinstance(model, ExportedProgram):
        return Report([planned(model, method)])
    wanted = method or HiPrune()
    wanted.check_applicable()
    target = compiler_internals.original_module(model) or model
    graphs: list[GraphReport] = []
    devices: list[torch.device] = []

    def planning(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        devices.extend(value.device for value in inputs if isinstance(value, Tensor))
        with compiler_internals.showing_the_user(OptionError):
            graphs.append(_planned(module, inputs, wanted))
        return module.forward

    traced = torch.compile(_fresh(_call), backend=planning, dynamic=False)
    traced(target, args, kwargs)
    if not graphs:
        raise TokenpassError(
            f"Dynamo captured no graph of {type(target).__name__}: does it run under torch.compile?"
        )
    return Report(graphs, _outside(target, args, kwargs, graphs), _machine(devices))


def _machine(devices: Sequence[torch.device]) -> Calibration | None:
    """What is known of the one device that a model runs on."""
    return calibrated(devices[0]) if len(set(devices)) == 1 else None


def budget_for(
    model: Callable[..., Any],
    *args: Any,
    target_flops: float,
    method: Method | None = None,
    **kwargs: Any,
) -> Method:
    """The method with the largest budget at which a model costs no more than a share of its FLOPs.

    Args:
        model: As in :func:`explain`.
        *args: Its inputs.
        target_flops: Share of the FLOPs, in (0, 1].
        method: What to plan, whose budget does not matter; default ``HiPrune()``.
        **kwargs: More inputs.

    Raises:
        OptionError: If the smallest budget costs more, or the method does not fit the model.
        TokenpassError: If Dynamo captures no graph at all.
    """
    wanted = method or HiPrune()
    target = compiler_internals.original_module(model) or model
    solved: list[Method] = []

    def solving(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        hint = partial(internals.size_hint, internals.current_fake_mode())
        with compiler_internals.showing_the_user(OptionError):
            solved.append(for_flops(module, inputs, wanted, target_flops, hint))
        return module.forward

    torch.compile(_fresh(_call), backend=solving, dynamic=False)(target, args, kwargs)
    if not solved:
        raise TokenpassError(
            f"Dynamo captured no graph of {type(target).__name__}: does it run under torch.compile?"
        )
    return min((m for m in solved if m != wanted), key=_share, default=wanted)


def _share(method: Method) -> float:
    return float(method.keep if method.keep is not None else 1.0)


def _planned(module: fx.GraphModule, inputs: Sequence[Any], method: Method) -> GraphReport:
    if isinstance(method, Eventful):
        return gate_graph(module, inputs, method, always=False, dry=True).report
    return rewrite(module, inputs, method, always=False, dry=True).report


def _call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own.

    Dynamo keeps compiled code with the code object and limits how often it is compiled anew: an
    explanation must not use up what the user's own compilations need.
    """
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def fresh_call() -> Callable[..., Any]:
    """Calls a model with a tuple and a dictionary of inputs; has a code object of its own."""
    return _fresh(_call)


def _outside(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    graphs: Sequence[GraphReport],
) -> list[Refusal]:
    """Attention that ran outside of every graph, which happens after a graph break."""
    if len(graphs) == 1:
        return []
    captured = sum(len(graph.attentions) for graph in graphs)
    try:
        with internals.counting_attention() as counter:
            model(*args, **kwargs)
    except Exception as error:  # a model may compile parts of itself, which no mode may watch
        reason = f"attention outside of the {len(graphs)} graphs could not be counted"
        return [Refusal(f"{reason}: {type(error).__name__}")]
    missing = counter.attentions - captured
    if missing <= 0:
        return []
    return [
        Refusal(
            f"{missing} of {counter.attentions} attentions ran outside of the {len(graphs)} graphs "
            "that Dynamo captured",
            hint="remove the graph breaks: TORCH_LOGS=graph_breaks shows them",
        )
    ]
