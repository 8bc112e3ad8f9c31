"""The one door to private torch APIs.

Everything below was tried on the torch versions in :data:`TRIED`; another version stops the import
with an error that says so, because a silent change of one of these would be a wrong result. Dynamo,
Inductor and what imports sympy are imported where they are used: they take long, and who uses them
has them loaded.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.traceback
from torch import fx
from torch._guards import TracingContext
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpass.errors import TokenpassError

if TYPE_CHECKING:
    import sympy

TRIED = ("2.13",)

if not torch.__version__.startswith(TRIED):
    raise TokenpassError(
        f"tokenpass works with torch {' or '.join(TRIED)}, found {torch.__version__}: "
        f"install one of these, or a tokenpass made for torch {torch.__version__}"
    )


# ---------------------------------------------------------------- tracing (2.13)


def current_fake_mode() -> FakeTensorMode:
    """The fake mode that Dynamo compiles the current graph under; outside of it a static one."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context else None
    return mode or FakeTensorMode(static_shapes=True, allow_non_fake_inputs=True)


def fake_inputs(
    mode: FakeTensorMode, placeholders: Sequence[fx.Node], values: Sequence[Any]
) -> list[Any]:
    """Fakes of a graph's inputs: parameters with static shapes, the rest as Dynamo saw them."""
    context = TracingContext.try_get()
    symbolic = context.tensor_to_context if context else {}

    def fake(node: fx.Node, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if context is None or isinstance(value, torch.nn.Parameter):
            return mode.from_tensor(value, static_shapes=True)
        source = getattr(node, "_dynamo_source", None)
        return mode.from_tensor(value, symbolic_context=symbolic.get(value), source=source)

    return [fake(node, value) for node, value in zip(placeholders, values, strict=True)]


def is_model_state(placeholder: fx.Node, value: Any) -> bool:
    """Whether a graph input is a parameter, a buffer or a global, and not what the user passed."""
    if isinstance(value, torch.nn.Parameter):
        return True
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return False
    guard = source.guard_source
    return bool(
        guard.is_specialized_nn_module()
        or guard.is_unspecialized_nn_module()
        or guard.is_fsdp_module()
        or guard.name.startswith("GLOBAL")
    )


def trace(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    mode: FakeTensorMode,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """``function`` as a graph of composite, differentiable ATen operators."""

    def traced(*args: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return function(*args)

    with mode:
        return make_fx(
            traced,
            decomposition_table=dict(decompositions or {}),
            pre_dispatch=True,
            _allow_non_fake_inputs=True,
        )(*inputs)


def symbolic_mode() -> FakeTensorMode:
    """A fake mode in which :func:`symbolic_count` makes sizes; all others are numbers."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    return FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)


def fakes_like(mode: FakeTensorMode, values: Iterable[Any]) -> list[Any]:
    """Fakes in ``mode`` of the same shapes, strides, dtypes and devices."""

    def fake(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    with mode:
        return [fake(value) for value in values]


def symbolic_count(mode: FakeTensorMode, hint: int, name: str) -> torch.SymInt:
    """A number that a graph traced under ``mode`` takes as an input, whatever its value."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    environment = mode.shape_env
    assert environment is not None
    source = ConstantSource(name)
    symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    return environment.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[return-value]


def propagate(module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Any:
    """Shapes and dtypes of a graph's outputs, computed anew from fake inputs."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    with mode:
        return FakeTensorProp(module, mode).propagate_dont_convert_inputs(*inputs)


@contextlib.contextmanager
def provenance(node: fx.Node, rule: str) -> Iterator[None]:
    """Nodes traced inside carry the stack trace of ``node`` and the name of the rule."""
    with (
        torch.fx.traceback.set_current_meta(node),
        torch.fx.traceback.annotate({"tokenpass": rule}),
    ):
        yield


def symbolic_size(mode: FakeTensorMode, expression: sympy.Expr) -> int | torch.SymInt:
    """A size as an integer, or as a symbolic integer that a trace under ``mode`` can follow."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    if expression.is_Integer:
        return int(expression)
    environment = mode.shape_env
    assert environment is not None
    symbols = {s: environment.create_symintnode(s, hint=None) for s in expression.free_symbols}
    return sympy_interp(PythonReferenceAnalysis, symbols, expression)  # type: ignore[no-any-return]


def specialise(inputs: Iterable[Any], symbols: Collection[sympy.Symbol]) -> None:
    """Compile for the values that some symbols have now; other values compile anew."""
    for value in inputs:
        for size in symbolic_sizes(value):
            if size.node.expr.free_symbols & set(symbols):
                int(size)


def symbolic_sizes(value: Any) -> list[torch.SymInt]:
    """The sizes of an input (or the input itself, if it is a number) that are no numbers."""
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return [size for size in sizes if isinstance(size, torch.SymInt)]


def size_hint(mode: FakeTensorMode, expression: sympy.Expr) -> int:
    """The value that a symbolic size has for the inputs of this compilation."""
    if expression.is_Integer:
        return int(expression)
    assert mode.shape_env is not None
    return int(mode.shape_env.optimization_hint(expression))


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes, of which either may be symbolic."""
    symbolic = isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt)
    return torch.sym_min(a, b) if symbolic else min(a, b)  # type: ignore[no-untyped-call]


def larger(a: int, b: int) -> int:
    """The larger of two sizes, of which either may be symbolic."""
    symbolic = isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt)
    return torch.sym_max(a, b) if symbolic else max(a, b)  # type: ignore[no-untyped-call]


def is_enter_autocast(target: Any) -> bool:
    return target is torch.amp.autocast_mode._enter_autocast


def is_exit_autocast(target: Any) -> bool:
    return target is torch.amp.autocast_mode._exit_autocast


def is_set_grad(target: Any) -> bool:
    return target is torch._C._set_grad_enabled


def checkpointed(
    target: Any, args: tuple[Any, ...]
) -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    """The graph inside a region of activation checkpointing, and its inputs.

    Its nodes, and what is traced from them, are marked to be computed again in the backward pass,
    which partitioners of joint graphs read. ``None`` if the call is no such region, or if a policy
    of the user's chooses what is kept.
    """
    if target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    from torch._higher_order_ops.wrap import uid
    from torch.utils.checkpoint import CheckpointPolicy

    body, *operands = args
    if "_checkpoint_context_fn" in body.meta:
        return None
    marked = fx.GraphModule(body, copy.deepcopy(body.graph))
    number = next(uid)
    for node in marked.graph.nodes:
        node.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": number}
    return marked, tuple(operands)


def is_flex_attention(target: Any) -> bool:
    return target is torch.ops.higher_order.flex_attention


# ---------------------------------------------------------------- counting (2.13)


class AttentionCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts softmax and fused attention operators that run eagerly."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)
        name = func.name() if schema is None else schema.name
        fused = "scaled_dot_product" in name or name == "flex_attention"
        self.attentions += fused or name == "aten::_softmax"
        return func(*args, **(kwargs or {}))


def counting_attention() -> AttentionCounter:
    """A context that counts the attention that runs inside it."""
    return AttentionCounter()


# ---------------------------------------------------------------- hooks (2.13)


def remove_global_hook(handle: Any) -> None:
    """Remove a hook of all modules; torch leaves behind that it takes keyword arguments.

    What is left makes every call of a compiled module warn of global hooks.
    """
    handle.remove()
    torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)


# ---------------------------------------------------------------- compiled code (2.13)


def cpp_library(source: str) -> ctypes.CDLL:
    """C++ compiled as Inductor compiles its kernels, from its cache if it was before."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source, needs_vec_isa=True)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- attention (2.13)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Output of fused attention and natural logarithm of its row sums; ``None`` if there is none.

    The CPU's kernel gives wrong numbers, without a word, unless the last dimensions of all but the
    mask are contiguous, and calls the logarithm 0 for a query whose keys are all masked.

    Args:
        query: ``(B, h, N, d)``.
        key: ``(B, h, M, d)``.
        value: ``(B, h, M, dv)``.
        mask: Added, in the dtype of the query; four dimensions that are 1 or as the scores have.
        scale: Factor of the scores.
    """
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    widths = (query.shape[-1], value.shape[-1])
    if query.is_cpu and widths[0] == widths[1]:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = fused(*inputs, attn_mask=mask, scale=scale)
        if mask is not None:
            lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
        return out, lse
    if query.is_cuda and mask is None and not any(width % 4 for width in widths):
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse, *_ = efficient(*inputs, None, True, scale=scale)
        return out, lse[..., : query.shape[2]]  # padded
    return None
