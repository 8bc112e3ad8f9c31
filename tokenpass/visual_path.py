"""What of the path from pixels to visual tokens need not run, or not on every token.

*Idle* modules are those whose outputs nothing of the visual tokens is computed from: a layer behind
the one whose states are read, the norm and the pooling behind it. Autograd tells which. Instead of
running they return tensors without data, so that whatever would read one after all fails.

*Row-wise* modules (a projector) treat every row alone, and each row goes into one visual token at
most. They run on the rows of the tokens that stay; other rows are not a number, so that whatever
would read one after all shows.

Neither changes the model: the path runs on a copy of the few modules above them, which shares all
weights and lives for one call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenpass.passes.row_wise import treats_rows_alone
from tokenpass.vision_attention import Call
from tokenpass.visual_cells import rows_of

NO_DATA = torch.device("meta")


class TakenAnotherWayError(Exception):
    """The path went another way than the one that is known."""


@dataclass(frozen=True)
class Shortcuts:
    """What can be left out of a path, by the names of modules.

    Attributes:
        idle: For each call of a module what it returned, without data.
        rows: For each row of a module's argument the visual token that it goes into, ``(rows,)``,
            int64; -1 for none.
    """

    idle: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.idle or self.rows)


def find_shortcuts(
    root: nn.Module,
    calls: Sequence[Call],
    features: Tensor,
    more: Sequence[Tensor],
    alone: dict[nn.Module, bool],
) -> Shortcuts:
    """What a path that ran under autograd can do without.

    Args:
        root: Holds the modules of the path.
        calls: All calls behind the last attention that the features depend on.
        features: All visual tokens, ``(count, D)``.
        more: Further tensors that are used of the result; those of ``count`` rows hold a row for
            each visual token.
        alone: Modules of which it is known whether they treat every row alone; grows.
    """
    behind = _behind([features, *more])
    by_module: dict[nn.Module, list[Call]] = {}
    for call in calls:
        by_module.setdefault(call.module, []).append(call)
    needed = {m for m, mine in by_module.items() if not all(_is_idle(c, behind) for c in mine)}
    idle: dict[str, tuple[Any, ...]] = {}
    rows: dict[str, Tensor] = {}
    targets = [x for x in (features, *more) if len(x) == len(features)]
    for name, module in root.named_modules():  # outer modules come before those inside them
        mine = by_module.get(module, [])
        if not mine or _is_part(name, (*idle, *rows)) or any(m.training for m in module.modules()):
            continue
        if not needed.intersection(module.modules()):
            idle[name] = tuple(without_data(call.output) for call in mine)
        elif len(mine) == 1 and len(targets) == 1 + len(more):
            found = _row_wise(mine[0], targets, alone)
            if found is not None:
                rows[name] = found
    return Shortcuts(idle, rows)


def _is_part(name: str, names: Iterable[str]) -> bool:
    return any(name.startswith(f"{outer}.") for outer in names)


def _behind(tensors: Iterable[Tensor]) -> set[Any]:
    """Everything in the autograd graph that ``tensors`` are computed from."""
    found: set[Any] = set()
    pending = [x.grad_fn for x in tensors if x.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [source for source, _ in node.next_functions if source is not None]
    return found


def _is_idle(call: Call, behind: set[Any]) -> bool:
    tensors = tensors_in(call.output)
    return bool(call.behind and tensors) and all(
        x.grad_fn is not None and x.grad_fn not in behind for x in tensors
    )


def _row_wise(call: Call, targets: Sequence[Tensor], alone: dict[nn.Module, bool]) -> Tensor | None:
    """For each row of a call's argument its visual token, if the call can run on some rows."""
    if call.attends or call.inputs is None or len(call.inputs) != 1:
        return None
    (x,), y = call.inputs, call.output
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() > 1 and y.requires_grad):
        return None
    heavy = any(p.dim() > 1 for p in call.module.parameters())
    if not heavy or x.shape[:-1] != y.shape[:-1] or not x.is_floating_point():
        return None
    if call.module not in alone:
        alone[call.module] = treats_rows_alone(call.module, x)
    same = alone[call.module] and _same_on_some(call.module, x, y)
    return rows_of(targets, y) if same else None


def _same_on_some(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether every other row alone gives what it gave among all: nothing counts the rows."""
    given = _as_rows(y)[..., ::2, :]
    with torch.no_grad():
        try:
            some = module(_as_rows(x)[..., ::2, :])
        except Exception:  # whatever a module does with another number of rows
            return False
        scale = given.abs().max() * torch.finfo(y.dtype).eps ** 0.5
        return some.shape == given.shape and bool((some - given).abs().max() <= scale)


def _as_rows(x: Tensor) -> Tensor:
    """All rows of ``(..., N, C)`` in one sequence, ``(1, rows, C)`` or ``(rows, C)``."""
    return x.reshape(*[1] * (x.dim() - 2), -1, x.shape[-1])


# ---------------------------------------------------------------- running


def shortened(root: nn.Module, shortcuts: Shortcuts, staying: Callable[[], Tensor]) -> nn.Module:
    """A copy of ``root`` that takes the shortcuts; it shares weights and modules.

    Args:
        root: Stays as it is.
        shortcuts: Of its path.
        staying: Asked once the first row-wise module is reached: for each visual token whether it
            stays, ``(count,)``, bool.
    """
    forwards: dict[str, Forward] = {}
    for name, outputs in shortcuts.idle.items():
        forwards[name] = partial(_returning, outputs)
    for name, tokens in shortcuts.rows.items():
        forwards[name] = partial(_on_staying, tokens, staying)
    return with_forwards(root, forwards)


Forward = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From the ``forward`` of a module to another one."""


def with_forwards(root: nn.Module, forwards: Mapping[str, Forward]) -> nn.Module:
    """A copy of ``root`` in which modules of some names have another ``forward``.

    Only these modules and those above them are copied; weights, buffers and hooks are shared.
    """
    copies: dict[str, nn.Module] = {"": _copy(root)}

    def copied(name: str) -> nn.Module:
        if name not in copies:
            outer, _, last = name.rpartition(".")
            holder = copied(outer)
            copies[name] = _copy(holder._modules[last])
            holder._modules[last] = copies[name]
        return copies[name]

    for name, change in forwards.items():
        module = copied(name)
        module.__dict__["forward"] = change(module.forward)
    return copies[""]


def _copy(module: nn.Module | None) -> nn.Module:
    made = copy.copy(module)
    assert made is not None
    made.__dict__["_modules"] = dict(made._modules)
    return made


def _returning(outputs: tuple[Any, ...], run: Callable[..., Any]) -> Callable[..., Any]:
    left = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return next(left)
        except StopIteration:
            raise TakenAnotherWayError from None

    return forward


def _on_staying(
    tokens: Tensor, staying: Callable[[], Tensor], run: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if x.shape[:-1].numel() != len(tokens):
            raise TakenAnotherWayError
        needed = (tokens >= 0) & staying().to(tokens.device)[tokens.clamp(min=0)]
        index = needed.nonzero().squeeze(1).to(x.device)
        some = run(_as_rows(x)[..., index, :])
        full = some.new_full((len(tokens), some.shape[-1]), torch.nan)
        full = full.index_copy(0, index, some.flatten(0, -2))
        return full.reshape(*x.shape[:-1], some.shape[-1])

    return forward


def without_data(value: Any) -> Any:
    """The same with tensors that have shapes and nothing else, in containers of any depth."""
    return mapped(value, lambda x: torch.empty_like(x, device=NO_DATA, requires_grad=False))


def only_with_data(value: Any) -> Any:
    """The same with ``None`` in place of tensors without data."""
    return mapped(value, lambda x: None if x.device == NO_DATA else x)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of a container, in which every tensor is changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(x, change) for x in value)
    if isinstance(value, Mapping):
        made: Any = copy.copy(value)
        for name in value:
            made[name] = mapped(value[name], change)
        return made
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in containers of any depth."""
    found: list[Tensor] = []
    mapped(value, found.append)
    return found
