"""Options that several commands share: the model, the method and its budget."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenpass.cli.screen import InputError

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="What to look at: `tokenpass --help` lists the forms."),
]
Input = Annotated[
    str | None,
    typer.Option("--input", "-i", metavar="3,224,224", help="Shape of an image or of a batch."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", "-w", metavar="FILE", help="A state dict; or `pretrained`; or `random`."
    ),
]
MethodName = Annotated[
    str | None, typer.Option("--method", "-m", help="hiprune (default) or eventful.")
]
Keep = Annotated[
    str | None,
    typer.Option("--keep", "-k", help="Patch tokens that stay: a share (0.36) or a number (98)."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="Any other option of the method."),
]
TargetFlops = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Instead of --keep: the FLOPs that may be left."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="From `tokenpass tune`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result for machines.")]


def number(name: str, text: str) -> int | float:
    """A number as it is written: ``98`` is an int, ``0.5`` a float.

    Raises:
        InputError: If it is none.
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InputError(f"{name} {text}: expected a number")


def numbers(name: str, text: str) -> list[int | float]:
    """Numbers between commas."""
    return [number(name, part.strip()) for part in text.split(",")]


def options(
    method: str | None, keep: str | None, others: Sequence[str] | None, **more: Any
) -> dict[str, Any]:
    """What ``torch.compile(..., options=...)`` takes.

    Args:
        method: Its name.
        keep: A share or a number.
        others: ``NAME=VALUE`` each; a value is a Python literal, or else a string.
        **more: Further options; those that are ``None`` are left out.

    Raises:
        InputError: If one of them is not of that form.
    """
    found: dict[str, Any] = {}
    for text in others or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: expected NAME=VALUE")
        found[name.strip()] = _literal(value.strip())
    given = {"method": method, "keep": None if keep is None else number("--keep", keep), **more}
    for name, value in given.items():
        if value is not None:
            found[name] = str(value) if isinstance(value, Path) else value
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
