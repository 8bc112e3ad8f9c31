"""One encoder of a zoo, measured: what is found in it, what converts, how far the numbers move.

Runs in a process of its own (:mod:`benchmarks.coverage` starts it), so that a crash or an encoder
that never ends costs one row.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import tokenpass
from benchmarks.masking import with_fewer_tokens
from tokenpass.errors import TokenpassWarning, described
from tokenpass.graph import short_place
from tokenpass.report import Report

SEED = 0
FRAMES = 3
"""A gated model's first frame is computed in full; the second and third go through its gates."""

TOLERANCE = 1e-4
"""Relative error at the full budget, in float32."""

UNTRACEABLE = "torch.compile itself fails"

MESSAGE = 300
"""Characters of an error or a reason that a row keeps."""

Row = dict[str, Any]


def load(path: Path) -> ModuleType:
    """The zoo: a module with a list ``ZOO`` of entries that have a ``name`` and ``build()``."""
    spec = importlib.util.spec_from_file_location("coverage_zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def serve(connection: Connection, path: Path) -> None:
    """Measure the entries whose names arrive, until none does."""
    torch.set_num_threads(1)
    entries = {entry.name: entry for entry in load(path).ZOO}
    while True:
        name, numerics = connection.recv()
        connection.send(measure(entries[name], numerics=numerics))


def measure(entry: Any, *, numerics: bool) -> Row:
    """One row of the table.

    Args:
        entry: Of the zoo.
        numerics: Whether the rewritten model runs, or is only planned.
    """
    started = time.perf_counter()
    row: Row = {}
    try:
        torch.manual_seed(SEED)
        model, inputs = entry.build()
        model.eval()
        spread(model)
        call = _caller(inputs)
        with torch.no_grad():
            row["prune"] = _method(model, call, tokenpass.HiPrune(keep=0.5), inputs)
            row["gate"] = _method(model, call, tokenpass.Eventful(keep=0.5), inputs)
            if numerics and not (reason := _untraceable(row["prune"])):
                row["prune"] |= _guarded(lambda: _pruned(model, call, inputs))
                row["prune"] |= _guarded(lambda: _reduced(model, call, inputs))
                row["gate"] |= _guarded(lambda: _gated(model, call, inputs))
            elif numerics:
                row["left"] = reason
    except Exception as error:
        row["error"] = described(error)[:MESSAGE]
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def spread(model: nn.Module) -> None:
    """Give parameters that begin at zero (LayerScale, biases) values that matter."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < 1e-3:
            parameter.data.normal_(0.0, 0.05, generator=generator)


def _caller(inputs: Any) -> Callable[[Any, Any], Any]:
    def call(function: Any, given: Any) -> Any:
        torch.manual_seed(SEED)
        return function(**given) if isinstance(inputs, dict) else function(*given)

    return call


def _guarded(run: Callable[[], Row]) -> Row:
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row = run()
        own = [str(item.message) for item in caught if item.category is TokenpassWarning]
        return row | ({"warnings": [text[:MESSAGE] for text in own]} if own else {})
    except Exception as error:
        return {"error": described(error)[:MESSAGE]}
    finally:
        torch._dynamo.reset()


# ------------------------------------------------------------ what is found


def _method(model: nn.Module, call: Callable[..., Any], method: Any, inputs: Any) -> Row:
    def explained() -> Row:
        def explain(*args: Any, **kwargs: Any) -> Report:
            return tokenpass.explain(model, *args, method=method, **kwargs)

        report: Report = call(explain, inputs)
        return {
            "graphs": len(report.graphs),
            "attentions": len(report.attentions),
            "mlps": len(report.mlps),
            "blocks": len(report.blocks),
            "converted": sum(graph.changed for graph in report.graphs),
            "share": round(report.flops / max(1, report.flops_before), 4),
            "refusals": _refusals(report),
        }

    return _guarded(explained)


def _untraceable(planned: Row) -> str:
    """Why no backend can compile an encoder, if none can."""
    reasons = (reason for reason, *_ in planned.get("refusals", []))
    return next((reason for reason in reasons if reason.startswith(UNTRACEABLE)), "")


def _refusals(report: Report) -> list[list[Any]]:
    counted = Counter(item.reason[:MESSAGE] for item in report.refusals)
    first = {item.reason[:MESSAGE]: item for item in reversed(report.refusals)}
    return [[r, n, first[r].node, short_place(first[r].place)] for r, n in counted.most_common()]


# ------------------------------------------------------------ numbers


def _pruned(model: nn.Module, call: Callable[..., Any], inputs: Any) -> Row:
    """Relative error at the full budget, and a call at half of it."""
    fast = _compiled(model, tokenpass.HiPrune(keep=1.0))
    row: Row = {"full": _error(model, call, inputs, call(fast, inputs)), "ran": _ran(fast)}
    tokenpass.set_budget(fast, keep=0.5)
    call(fast, inputs)
    return row


def _reduced(model: nn.Module, call: Callable[..., Any], inputs: Any) -> Row:
    """Relative error at half the tokens against the masking executor, where it can be told."""
    method = tokenpass.HiPrune(keep=0.5, dropped="discard")
    fast = _compiled(model, method, record_cuts=True)
    found, graphs = call(fast, inputs), tokenpass.report(fast).graphs
    if len(graphs) != 1 or not graphs[0].converted:
        return {"reduced": None}
    kept = [cut.kept for cut in tokenpass.cuts(fast)]
    expected = with_fewer_tokens(lambda: call(model, inputs), graphs[0], kept)
    return {"reduced": None if expected is None else relative_error(found, *expected)}


def _gated(model: nn.Module, call: Callable[..., Any], inputs: Any) -> Row:
    """Largest relative error over frames that all pass the gates."""
    fast = _compiled(model, tokenpass.Eventful(keep=1.0))
    frames = [changed(inputs, number) for number in range(FRAMES)]
    found = [call(fast, frame) for frame in frames]
    errors = [_error(model, call, *pair) for pair in zip(frames, found, strict=True)]
    row: Row = {"full": max(errors), "ran": _ran(fast)}
    if row["full"] > TOLERANCE:
        worst = errors.index(row["full"])
        row |= _from_float64(model, call, frames[worst], found[worst])
    return row


def _from_float64(model: nn.Module, call: Callable[..., Any], inputs: Any, found: Any) -> Row:
    """How far ``found`` and eager mode are from the model in float64, relative."""

    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    expected = call(copy.deepcopy(model).double(), torch.utils._pytree.tree_map(double, inputs))
    eager = relative_error(call(model, inputs), expected)
    return {"from_float64": relative_error(found, expected), "eager_from_float64": eager}


def _error(model: nn.Module, call: Callable[..., Any], inputs: Any, found: Any) -> float:
    """Relative error against eager mode; where that differs from its own graph, against the graph.

    A library may compute something else where it sees that it is being traced.
    """
    error = relative_error(found, call(model, inputs))
    if error <= TOLERANCE:
        return error
    graph = torch.compile(model, backend="eager", dynamic=False)
    return relative_error(found, call(graph, inputs))


def _compiled(model: nn.Module, method: Any, **options: Any) -> Any:
    backend = tokenpass.backend(method, inner="eager", always_rewrite=True, **options)
    return torch.compile(model, backend=backend, dynamic=False)


def _ran(fast: Any) -> bool:
    return bool(tokenpass.report(fast).converted)


def changed(inputs: Any, number: int) -> Any:
    """A later frame: a part of every floating-point input is different."""
    generator = torch.Generator().manual_seed(number)

    def other(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point() and number):
            return x
        noise = torch.randn(x.shape, generator=generator)
        noise[..., : x.shape[-1] // 2] = 0.0
        return x + 0.1 * noise

    return torch.utils._pytree.tree_map(other, inputs)


def tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors of a model's output, in order."""
    leaves = torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value expected, over all output tensors."""
    worst = 0.0
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        if not b.numel():
            continue
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12)
        worst = max(worst, float("inf") if error.isnan() else float(error))
    return worst
