"""The ``options`` of ``torch.compile(..., backend="tokenpass", options={...})``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass.config import read_config, within
from tokenpass.errors import OptionError
from tokenpass.methods import Eventful, HiPrune, Method

METHODS: dict[str, type[Method]] = {"hiprune": HiPrune, "eventful": Eventful}

Inner = str | Callable[..., Any]


@dataclass(frozen=True)
class Settings:
    """How to compile.

    Attributes:
        method: What to do with the tokens.
        pruning: What to do before, where ``method`` is gating: of a video, tokens are left out, and
            those that are left are computed where they changed.
        inner: The backend that the rewritten graph goes to: a name, or a backend itself.
        always_rewrite: Rewrite at full budget too, and where the cost model says that it does not
            pay.
        record_cuts: Remember what each cut of a call did, for :func:`tokenpass.cuts`.
        target_flops: Share of a graph's FLOPs from which its budget is solved.
        target_ms: Milliseconds that a call of a pruned graph may take, without gradients; the
            budget is found by timing some in the first call.
        mode: Mode of Inductor (``"reduce-overhead"``, ``"max-autotune"``, ...).

    Raises:
        OptionError: If a value is none of these.
    """

    method: Method = field(default_factory=HiPrune)
    inner: Inner = "inductor"
    always_rewrite: bool = False
    mode: str | None = None
    record_cuts: bool = False
    target_flops: float | None = None
    target_ms: float | None = None
    pruning: HiPrune | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, tuple(METHODS.values())):
            raise OptionError(f"method={self.method!r}: expected one of {_choices(METHODS)}")
        self.method.check_applicable()
        if self.pruning is not None:
            self._check_both(self.pruning)
        for name in ("always_rewrite", "record_cuts"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}: expected True or False")
        self._check_targets()
        names = compiler_internals.backend_names()
        if not callable(self.inner) and self.inner not in names:
            raise OptionError(f"inner={self.inner!r}: choose one of {_choices(names)}")
        if self.inner == "tokenpass":
            raise OptionError('inner="tokenpass" would compile for ever: name another backend')
        if self.mode is not None and self.inner != "inductor":
            raise OptionError(
                f"mode={self.mode!r} is Inductor's: it contradicts inner={self.inner!r}"
            )

    def _check_both(self, pruning: HiPrune) -> None:
        pruning.check_applicable()
        if pruning.output == "pruned":
            raise OptionError(
                'output="pruned" beside Eventful: from frame to frame tokens keep places that are '
                'not in the order of the grid; take output="restored" and tokenpass.kept'
            )
        for name in ("target_flops", "target_ms", "record_cuts"):
            if getattr(self, name):
                raise OptionError(f"{name} is for one method, not for pruning and gating together")

    def _check_targets(self) -> None:
        flops, ms = self.target_flops, self.target_ms
        if flops is not None and not (_is_number(flops) and 0 < flops <= 1):
            raise OptionError(f"target_flops={flops!r}: expected a share in (0, 1]")
        if ms is not None and not (_is_number(ms) and ms > 0):
            raise OptionError(f"target_ms={ms!r}: expected a positive number of milliseconds")
        method = self.method
        own = {name: getattr(method, name, None) for name in ("keep", "threshold")}
        if own["keep"] == type(method)().keep or getattr(method, "stages", None):
            del own["keep"]  # a schedule keeps its proportions
        if flops is not None or ms is not None:
            one_budget({**own, "target_flops": flops, "target_ms": ms})
        if ms is not None and isinstance(method, Eventful):
            raise OptionError(
                f"target_ms={ms:g} is for pruning: behind gates each frame has its own time, and "
                "tokenpass.LatencyTarget(ms).run(compiled, frame) steers the budget"
            )


def in_turn(method: Method | Sequence[Method] | None) -> tuple[Method, HiPrune | None]:
    """The method of a graph, and the pruning before it: ``[HiPrune(...), Eventful(...)]``.

    Raises:
        OptionError: For any other sequence.
    """
    if method is None:
        return HiPrune(), None
    if isinstance(method, (HiPrune, Eventful)):
        return method, None
    given = [*method] if isinstance(method, Sequence) and not isinstance(method, str) else []
    prunings = [item for item in given if isinstance(item, HiPrune)]
    gatings = [item for item in given if isinstance(item, Eventful)]
    if len(given) != 2 or len(prunings) != 1 or len(gatings) != 1:
        raise OptionError(
            f"method={method!r}: choose one of {_choices(METHODS)}, or pass HiPrune(...), "
            "Eventful(...), or one of each in a list"
        )
    return gatings[0], prunings[0]


Options = Mapping[str, Any] | str | os.PathLike[str]

BUDGETS = ("keep", "threshold", "target_flops", "target_ms", "max_loss")
"""Options of which each says how many tokens stay."""

TOGETHER = {"keep", "threshold"}
"""Those that a method takes together."""


def one_budget(given: Mapping[str, Any]) -> None:
    """Raise :class:`OptionError` where several options say how many tokens stay."""
    budgets = {name: given[name] for name in BUDGETS if given.get(name) is not None}
    if len(budgets) > 1 and set(budgets) != TOGETHER:
        named = " and ".join(f"{name}={value!r}" for name, value in budgets.items())
        raise OptionError(f"{named} contradict each other: pass one of them")


def _from_file(given: dict[str, Any]) -> dict[str, Any]:
    """Options with those of the file that they name, and the budget within ``max_loss``."""
    path, max_loss = given.pop("config", None), given.pop("max_loss", None)
    if path is None:
        if max_loss is not None:
            raise OptionError(
                f'max_loss={max_loss!r} needs measurements: pass config="tokenpass.toml" with it, '
                "which `tokenpass tune` writes"
            )
        return given
    config = read_config(path)
    budget = next((name for name in BUDGETS if name in given), None)
    if budget is not None:
        raise OptionError(
            f"{budget}={given[budget]!r} and config={str(path)!r} contradict each other: the file "
            "has a budget"
        )
    if max_loss is None:
        return {**config.options, **given}
    if not _is_number(max_loss):
        raise OptionError(f"max_loss={max_loss!r}: expected a number of points")
    return {**within(config, max_loss), **given}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse_options(options: Options | None, mode: str | None = None) -> Settings:
    """Settings from what a user passes to ``torch.compile``: a dictionary, or the path of a file.

    Raises:
        OptionError: For a name or a value that does not exist, naming the choices, and where
            several options say how many tokens stay.
    """
    given: dict[str, Any] = (
        {"config": options} if isinstance(options, (str, os.PathLike)) else dict(options or {})
    )
    one_budget(given)
    given = _from_file(given)
    method = given.pop("method", "hiprune")
    general = {field.name for field in dataclasses.fields(Settings)} - {"method"}
    settings = {name: given.pop(name) for name in list(given) if name in general}
    if mode is not None:
        settings["mode"] = mode
    if not isinstance(method, str):
        if given:
            raise OptionError(f"{_choices(given)} beside a method object: set them on the object")
        last, pruning = in_turn(method)
        return Settings(method=last, pruning=pruning, **settings)
    if method not in METHODS:
        raise OptionError(f"method={method!r}: choose one of {_choices(METHODS)}")
    fields = {field.name for field in dataclasses.fields(METHODS[method])}
    unknown = set(given) - fields
    if unknown:
        known = sorted(fields | general | {"method", "config", "max_loss"})
        raise OptionError(f"unknown option {_choices(unknown)}: choose among {_choices(known)}")
    return Settings(method=METHODS[method](**given), **settings)


def _choices(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names))
