"""The ``torch.compile`` backend: by name through the entry point, or typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass.arrivals import arrivals_of
from tokenpass.errors import OptionError
from tokenpass.methods import Eventful, Method
from tokenpass.options import Inner, Options, Settings, in_turn, parse_options
from tokenpass.runtime import CompiledGraph
from tokenpass.streaming import GatedGraph
from tokenpass.wrapped_inputs import compile_unwrapped

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def tokenpass_backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Options | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="tokenpass", options=...)`` calls for each graph.

    Args:
        module: A graph from Dynamo.
        inputs: Its example inputs.
        mode: As in ``torch.compile``; goes to Inductor.
        options: ``method``, ``inner``, ``always_rewrite``, ``mode``, the fields of the method, and
            in place of its budget ``target_flops`` or ``target_ms``; or the path of a file that
            ``tokenpass tune`` wrote, which is also an option itself (``config``).

    Raises:
        OptionError: For an unknown option or value.
    """
    with compiler_internals.showing_the_user(OptionError):
        return _compile(module, parse_options(options, mode), inputs)


def backend(
    method: Method | Sequence[Method] | None = None,
    *,
    inner: Inner = "inductor",
    always_rewrite: bool = False,
    mode: str | None = None,
    record_cuts: bool = False,
    target_flops: float | None = None,
    target_ms: float | None = None,
) -> Backend:
    """A backend for ``torch.compile(model,
    backend=tokenpass.backend(tokenpass.HiPrune(keep=0.5)))``.

    Args:
        method: What to do with the tokens; default ``HiPrune()``. ``[HiPrune(...),
            Eventful(...)]`` prunes the frames of a video and gates what is left of them.
        inner: The backend that the rewritten graph goes to, by name or itself.
        always_rewrite: Rewrite at full budget too, and where the cost model says it does not pay.
        mode: Mode of Inductor.
        target_flops: Share of the FLOPs from which the budget is solved, instead of ``keep``.
        target_ms: Milliseconds that a call may take, from which the budget is found.
        record_cuts: Remember what each cut of a call did, for :func:`tokenpass.cuts`.

    Raises:
        OptionError: If one of them is not valid.
    """
    last, pruning = in_turn(method)
    settings = Settings(
        last,
        inner,
        always_rewrite,
        mode,
        record_cuts=record_cuts,
        target_flops=target_flops,
        target_ms=target_ms,
        pruning=pruning,
    )

    def tokenpass(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with compiler_internals.showing_the_user(OptionError):
            return _compile(module, settings, inputs)

    return tokenpass


def _compile(
    module: fx.GraphModule, settings: Settings, inputs: Sequence[Any]
) -> Callable[..., Any]:
    frame, owner = compiler_internals.frame_number(), compiler_internals.compiling_backend()

    def compiling(plain: fx.GraphModule, values: Sequence[Any]) -> CompiledGraph | GatedGraph:
        if isinstance(settings.method, Eventful):
            return GatedGraph(plain, settings, values, owner, frame)
        arrivals = arrivals_of(compiler_internals.real_inputs(plain))
        return CompiledGraph(plain, settings, values, owner, frame, arrivals)

    return compile_unwrapped(compiling, module, inputs)
