"""Look before compiling: what would be found and done in a model."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from tokenpass import torch_internals as internals
from tokenpass.errors import OptionError, TokenpassError
from tokenpass.gated import gate_graph
from tokenpass.methods import Eventful, HiPrune, Method
from tokenpass.pipeline import rewrite
from tokenpass.report import GraphReport, Refusal, Report


def explain(
    model: Callable[..., Any], *args: Any, method: Method | None = None, **kwargs: Any
) -> Report:
    """Plan a method on a model; compile nothing.

    The model runs once with the given inputs, in eager mode, so that Dynamo can trace it.

    Args:
        model: A module or a function; a compiled one is explained as it was before.
        *args: Its inputs.
        method: What to plan; default ``HiPrune()``.
        **kwargs: More inputs.

    Returns:
        Blocks, tokens, cost and refusals over all graphs that Dynamo makes of the model.

    A model that ``torch.compile`` cannot trace, with any backend, has a refusal that says so.

    Raises:
        OptionError: If the method does not fit the model.
        TokenpassError: If Dynamo captures no graph at all.
    """
    wanted = method or HiPrune()
    wanted.check_applicable()
    target = internals.original_module(model) or model
    graphs: list[GraphReport] = []
    ran: list[GraphReport] = []

    def planning(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with internals.showing_the_user(OptionError):
            graph = _planned(module, inputs, wanted)
        graphs.append(graph)

        def running(*values: Any) -> Any:
            ran.append(graph)
            return module.forward(*values)

        return running

    traced = torch.compile(_fresh(_call), backend=planning, dynamic=False)
    try:
        traced(target, args, kwargs)
    except Exception as error:
        if not internals.is_failure_of_dynamo(error):
            raise
        return Report(
            graphs, [Refusal(f"torch.compile itself fails on this model: {_line(error)}")]
        )
    if not graphs:
        raise TokenpassError(
            f"Dynamo captured no graph of {type(target).__name__}: does it run under torch.compile?"
        )
    return Report(graphs, _outside(target, args, kwargs, ran))


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), type(error).__name__)


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
            "that Dynamo captured: remove the graph breaks (TORCH_LOGS=graph_breaks shows them)"
        )
    ]
