"""The ``options`` of ``torch.compile(..., backend="tokenpass", options={...})``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenpass import torch_internals as internals
from tokenpass.errors import OptionError
from tokenpass.methods import Eventful, HiPrune, Method

METHODS: dict[str, type[Method]] = {"hiprune": HiPrune, "eventful": Eventful}

Inner = str | Callable[..., Any]


@dataclass(frozen=True)
class Settings:
    """How to compile.

    Attributes:
        method: What to do with the tokens.
        inner: The backend that the rewritten graph goes to: a name, or a backend itself.
        always_rewrite: Rewrite at full budget too, and where the cost model says that it does not
            pay.
        mode: Mode of Inductor (``"reduce-overhead"``, ``"max-autotune"``, ...).

    Raises:
        OptionError: If a value is none of these.
    """

    method: Method = field(default_factory=HiPrune)
    inner: Inner = "inductor"
    always_rewrite: bool = False
    mode: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, tuple(METHODS.values())):
            raise OptionError(f"method={self.method!r}: expected one of {_choices(METHODS)}")
        self.method.check_applicable()
        if not isinstance(self.always_rewrite, bool):
            raise OptionError(f"always_rewrite={self.always_rewrite!r}: expected True or False")
        names = internals.backend_names()
        if not callable(self.inner) and self.inner not in names:
            raise OptionError(f"inner={self.inner!r}: choose one of {_choices(names)}")
        if self.inner == "tokenpass":
            raise OptionError('inner="tokenpass" would compile for ever: name another backend')
        if self.mode is not None and self.inner != "inductor":
            raise OptionError(
                f"mode={self.mode!r} is Inductor's: it contradicts inner={self.inner!r}"
            )


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Settings:
    """Settings from the dictionary that a user passes to ``torch.compile``.

    Raises:
        OptionError: For a name or a value that does not exist, naming the choices.
    """
    given = dict(options or {})
    method = given.pop("method", "hiprune")
    general = {field.name for field in dataclasses.fields(Settings)} - {"method"}
    settings = {name: given.pop(name) for name in list(given) if name in general}
    if mode is not None:
        settings["mode"] = mode
    if isinstance(method, (HiPrune, Eventful)):
        if given:
            raise OptionError(f"{_choices(given)} beside a method object: set them on the object")
        return Settings(method=method, **settings)
    if method not in METHODS:
        raise OptionError(f"method={method!r}: choose one of {_choices(METHODS)}")
    fields = {field.name for field in dataclasses.fields(METHODS[method])}
    unknown = set(given) - fields
    if unknown:
        known = sorted(fields | general | {"method"})
        raise OptionError(f"unknown option {_choices(unknown)}: choose among {_choices(known)}")
    return Settings(method=METHODS[method](**given), **settings)


def _choices(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names))
