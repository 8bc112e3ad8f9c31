"""The part of the door to private torch APIs that leads to ``torch.export``.

Tried on torch 2.13; :mod:`tokenpass.torch_internals` stops the import on another version.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature


def wrapped_region(
    target: Any, args: tuple[Any, ...]
) -> tuple[AbstractContextManager[Any], fx.GraphModule, tuple[Any, ...]] | None:
    """What ``torch.export`` wraps a region of autocast or of switched gradients into.

    Returns:
        The context, the graph inside and its inputs; ``None`` if the call is no such region.
    """
    if target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        enabled, body, *operands = args
        return torch.set_grad_enabled(enabled), body, tuple(operands)
    if target is torch.ops.higher_order.wrap_with_autocast:
        *settings, body = args[:5]
        return torch.autocast(*settings), body, args[5:]
    return None


def mode_of(values: Iterable[Any]) -> FakeTensorMode:
    """The fake mode that the fakes of an exported graph live in."""
    return detect_fake_mode(list(values)) or FakeTensorMode(static_shapes=True)


@contextlib.contextmanager
def no_new_guards(mode: FakeTensorMode) -> Iterator[None]:
    """Stop with an error where a trace would assume something of a symbolic size.

    An exported program checks its inputs against the ranges that it was exported with, and nothing
    else.
    """
    if mode.shape_env is None:
        yield
    else:
        with mode.shape_env.error_on_new_guards():
            yield


def with_wrapped_regions(module: fx.GraphModule) -> fx.GraphModule:
    """The inverse of :func:`wrapped_region`, for all regions of a graph."""
    from torch._export.passes.replace_autocast_with_hop_pass import replace_autocast_with_hop_pass
    from torch._export.passes.replace_set_grad_with_hop_pass import replace_set_grad_with_hop_pass

    module, _ = replace_set_grad_with_hop_pass(module, None)
    module, _ = replace_autocast_with_hop_pass(module, None)
    return module


def program_with(
    program: ExportedProgram, module: fx.GraphModule, signature: ExportGraphSignature
) -> ExportedProgram:
    """A program that computes something else from the same inputs, parameters and constants."""
    with warnings.catch_warnings():  # torch 2.13 copies tree specs in a way that it warns of
        warnings.simplefilter("ignore", FutureWarning)
        return program._update(module, signature)
