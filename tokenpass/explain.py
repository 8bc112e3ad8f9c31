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
from tokenpass.arrivals import Handover, arrivals_of
from tokenpass.budgets import for_flops
from tokenpass.calibration import Calibration, calibrated
from tokenpass.errors import OptionError, TokenpassError, described
from tokenpass.export import planned
from tokenpass.gated import gate_graph
from tokenpass.methods import Eventful, HiPrune, Method
from tokenpass.options import Settings, in_turn
from tokenpass.pipeline import rewrite
from tokenpass.prune_and_gate import prune_and_gate
from tokenpass.report import GraphReport, Refusal, Report
from tokenpass.wrapped_inputs import compile_unwrapped


def explain(
    model: Callable[..., Any] | ExportedProgram,
    *args: Any,
    method: Method | Sequence[Method] | None = None,
    **kwargs: Any,
) -> Report:
    """Plan a method on a model; compile nothing.

    The model runs once with the given inputs, in eager mode, so that Dynamo can trace it; an
    exported program does not run.

    Args:
        model: A module or a function; a compiled one is explained as it was before. Or a program
            of ``torch.export``, which has its example inputs.
        *args: Its inputs.
        method: What to plan; default ``HiPrune()``. ``[HiPrune(...), Eventful(...)]`` for both.
        **kwargs: More inputs.

    Returns:
        Blocks, tokens, cost and refusals over all graphs that Dynamo makes of the model.

    A model that ``torch.compile`` cannot trace, with any backend, has a refusal that says so.

    Raises:
        OptionError: If the method does not fit the model.
        TokenpassError: If Dynamo captures no graph at all.
    """
    settings = _settings(method)
    if isinstance(model, ExportedProgram):
        return Report([planned(model, settings.method)])
    target = compiler_internals.original_module(model) or model
    graphs: list[GraphReport] = []
    ran: list[GraphReport] = []
    devices: list[torch.device] = []

    def planning(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        devices.extend(value.device for value in inputs if isinstance(value, Tensor))
        with compiler_internals.showing_the_user(OptionError):
            graph, handover = _planned(module, inputs, settings)
        graphs.append(graph)

        def running(*values: Any) -> Any:
            ran.append(graph)
            axes = handover.axes(values)
            outputs = module.forward(*values)
            handover.tell(axes, outputs)
            return outputs

        return running

    traced = torch.compile(
        _fresh(_call), backend=partial(compile_unwrapped, planning), dynamic=False
    )
    try:
        traced(target, args, kwargs)
    except Exception as error:
        if not compiler_internals.is_failure_of_dynamo(error):
            raise
        return Report(
            graphs, [Refusal(f"torch.compile itself fails on this model: {described(error)}")]
        )
    if not graphs:
        raise TokenpassError(
            f"Dynamo captured no graph of {type(target).__name__}: does it run under torch.compile?"
        )
    return Report(graphs, _outside(target, args, kwargs, ran), _machine(devices))


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

    backend = partial(compile_unwrapped, solving)
    torch.compile(_fresh(_call), backend=backend, dynamic=False)(target, args, kwargs)
    if not solved:
        raise TokenpassError(
            f"Dynamo captured no graph of {type(target).__name__}: does it run under torch.compile?"
        )
    return min((m for m in solved if m != wanted), key=_share, default=wanted)


def _share(method: Method) -> float:
    return float(method.keep if method.keep is not None else 1.0)


def _settings(method: Method | Sequence[Method] | None) -> Settings:
    last, pruning = in_turn(method)
    return Settings(last, pruning=pruning)


def _planned(
    module: fx.GraphModule, inputs: Sequence[Any], settings: Settings
) -> tuple[GraphReport, Handover]:
    method, pruning = settings.method, settings.pruning
    arrivals = arrivals_of(compiler_internals.real_inputs(module))
    if isinstance(method, Eventful) and pruning is not None:
        gated = prune_and_gate(module, inputs, pruning, method, always=False).gated
        return gated.report, Handover()
    if isinstance(method, Eventful):
        gates = gate_graph(module, inputs, method, always=False, dry=True, arrivals=arrivals)
        return gates.report, gates.handover
    made = rewrite(module, inputs, method, always=False, dry=True, arrivals=arrivals)
    return made.report, made.handover


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
    ran: Sequence[GraphReport],
) -> list[Refusal]:
    """Attention that ran outside of every graph, which happens after a graph break.

    Args:
        model: What was explained.
        args: Its inputs.
        kwargs: More inputs.
        ran: The graphs in the order of their calls: one graph may serve all blocks of a model.
    """
    graphs = len({id(graph) for graph in ran})
    if graphs == 1:
        return []
    captured = sum(len(graph.attentions) for graph in ran)
    try:
        with internals.counting_attention() as counter:
            model(*args, **kwargs)
    except Exception as error:  # a model may compile parts of itself, which no mode may watch
        reason = f"attention outside of the {graphs} graphs could not be counted"
        return [Refusal(f"{reason}: {type(error).__name__}")]
    missing = counter.attentions - captured
    if missing <= 0:
        return []
    return [
        Refusal(
            f"{missing} of {counter.attentions} attentions ran outside of the {graphs} graphs "
            "that Dynamo captured",
            hint="remove the graph breaks: TORCH_LOGS=graph_breaks shows them",
        )
    ]
