"""The part of the door to private torch APIs that leads to Dynamo and to other backends.

Tried on torch 2.13; :mod:`tokenpass.torch_internals` stops the import on another version.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._guards import CompileContext, CompileId

Compiled = Callable[..., Any]

Compilation: TypeAlias = CompileId
"""Which compilation of Dynamo something belongs to."""


# ---------------------------------------------------------------- wrappers (2.13)


def is_wrapper(value: Any) -> bool:
    """Whether a tensor wraps others that can be taken out of it and put back."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(value)) and not value.is_nested


def answers_functions(wrapper: Any) -> bool:
    """Whether a wrapper answers functions before they are dispatched, where graphs are traced."""
    given = type(wrapper).__torch_function__
    plain = torch.Tensor.__torch_function__
    return given is not torch._C._disabled_torch_function_impl and given.__func__ is not (
        plain.__func__  # type: ignore[attr-defined]
    )


def wrapped_names(wrapper: Any) -> tuple[list[str], Any]:
    """The attributes that hold what is wrapped, and what else a wrapper is made of."""
    names, context = wrapper.__tensor_flatten__()
    return list(names), context


def attribute_source(source: Any, name: str) -> Any:
    """Where Dynamo finds an attribute of what it finds at ``source``."""
    from torch._dynamo.source import AttrSource

    return None if source is None else AttrSource(source, name)


# ---------------------------------------------------------------- backends (2.13)


@contextlib.contextmanager
def showing_the_user(kind: type[Exception]) -> Iterator[None]:
    """Let exceptions of a kind reach the caller of a compiled model as what they are.

    Dynamo wraps what a backend raises, unless it is a ``ShortenTraceback``.
    """
    from torch._dynamo.exc import ShortenTraceback

    try:
        yield
    except kind as error:
        shown = type(type(error).__name__, (ShortenTraceback, type(error)), {})
        raise shown(*error.args, first_useful_frame=None) from None


def frame_number() -> int | None:
    """Which frame the running compilation is of; compiling a frame anew keeps its number."""
    compilation = compilation_id()
    return compilation.frame_id if compilation else None


def real_inputs(module: fx.GraphModule) -> list[Any]:
    """What the inputs of Dynamo's graph are in the call that it is being compiled for.

    ``None`` where that is not known.
    """
    found: list[Any] = []
    for node in module.graph.find_nodes(op="placeholder"):
        given = node.meta.get("grapharg")
        found.append(None if given is None or not given.is_tensor else given.example)
    return found


def compilation_id() -> Compilation | None:
    """The compilation of Dynamo that is running."""
    return CompileContext.current_compile_id()


def steers_compilation(error: Exception) -> bool:
    """Whether an exception is how Dynamo and its backends steer compilation, and no failure."""
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    return isinstance(error, (RestartAnalysis, SkipFrame))


def is_failure_of_dynamo(error: Exception) -> bool:
    """Whether Dynamo itself failed while it traced, which it does with any backend."""
    from torch._dynamo.exc import InternalTorchDynamoError

    return isinstance(error, InternalTorchDynamoError)


def backend_names() -> list[str]:
    """The backends that ``torch.compile`` knows by name."""
    from torch._dynamo.backends.registry import list_backends

    return sorted(list_backends(exclude_tags=()))


def inner_compile(
    name: str,
    module: fx.GraphModule,
    inputs: Sequence[Any],
    mode: str | None,
    *,
    in_order: bool = False,
) -> Compiled:
    """Hand a graph to another torch.compile backend.

    Args:
        name: Of the backend.
        module: The graph.
        inputs: Example inputs.
        mode: Of ``torch.compile``, for Inductor.
        in_order: Whether what is read before it is written must stay so. Inductor moves operations
            towards what needs them; if a read passes a write that way, all that is written is
            copied first.
    """
    from torch._dynamo.backends.registry import lookup_backend
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    if name == "inductor":
        patches = {**list_mode_options(mode)} if mode else {}
        if in_order:
            patches["reorder_for_locality"] = False
        return compile_fx(module, inputs, config_patches=patches)  # type: ignore[return-value]
    return lookup_backend(name)(module, list(inputs))


def compiling_backend() -> object | None:
    """The backend object of the ``torch.compile`` call whose graph is being compiled."""
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch._dynamo.eval_frame import innermost_backend
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:
        return None
    backend = innermost_backend(translator.output.compiler_fn)  # type: ignore[arg-type]
    splitter = getattr(backend, "__self__", None)
    if isinstance(splitter, DDPOptimizer):  # stands before the backend while DDP runs
        return innermost_backend(splitter.backend_compile_fn)
    return backend


def backend_of(compiled: Any) -> object | None:
    """The backend object behind what ``torch.compile`` returned, or behind ``module.compile()``."""
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

    if isinstance(compiled, OptimizedModule):
        return innermost_backend(compiled.dynamo_ctx.callback)  # type: ignore[arg-type]
    call = getattr(compiled, "_compiled_call_impl", None) or compiled
    if not inspect.isfunction(call):
        return None
    callback = inspect.getclosurevars(call).nonlocals.get("callback")
    return innermost_backend(callback) if callback is not None else None


def original_module(compiled: Any) -> torch.nn.Module | None:
    """The user's module inside a compiled one."""
    from torch._dynamo.eval_frame import OptimizedModule

    if isinstance(compiled, OptimizedModule):
        return compiled._orig_mod
    return compiled if isinstance(compiled, torch.nn.Module) else None


def parameters_in_graphs(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """A model's parameters, and what graphs take in their place: where FSDP shards them, they are
    put together in others for each call."""
    yield from model.parameters()
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for each in group.fsdp_params:
                    yield getattr(each, "_unsharded_param", each.sharded_param)


# ---------------------------------------------------------------- logging (2.13)


def trace_artifact(name: str, text: Callable[[], str], compilation: Compilation | None) -> None:
    """A text for ``TORCH_TRACE`` and tlparse, under the compilation that it belongs to.

    Args:
        name: Of the artifact.
        text: Makes it; not called unless a trace is written.
        compilation: From :func:`compilation_id`, for what is compiled after Dynamo is done.
    """
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
        compile_id=compilation,
        expect_trace_id=False,
    )
