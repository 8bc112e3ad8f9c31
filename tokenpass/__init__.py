"""Token reduction for vision transformers as a ``torch.compile`` backend."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

from tokenpass import held, incremental, kernels, running_softmax

if TYPE_CHECKING:
    from tokenpass.public import *  # noqa: F403
    from tokenpass.public import __all__ as __all__

__version__ = "0.1.0"

OPERATORS = (held, kernels, incremental, running_softmax)
"""Modules whose import registers operators, for programs that were saved with them."""

FUNCTIONS = ("backend", "cuts", "explain", "report")
"""Functions that have the name of the module that they are in."""


if not TYPE_CHECKING:  # a type checker knows the names, and that there are no others

    def __getattr__(name: str) -> Any:
        """A module, or the public names, loaded together: sympy takes longer than the rest."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name not in FUNCTIONS and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        public = importlib.import_module(f"{__name__}.public")
        names = public.__all__
        globals().update({key: getattr(public, key) for key in names}, __all__=names)
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        return [*globals(), *__getattr__("__all__")]


class _Package(types.ModuleType):
    """A package in which a function is not hidden by the module of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in FUNCTIONS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
