"""What commands say: results on stdout, everything else on stderr; and files that are whole."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from tokenpass.errors import TokenpassError

WIDEST = 120
"""Columns that are used at most, however wide the terminal is."""

NO = 1
"""Exit code: looked, and the answer is no."""
WRONG = 2
"""Exit code: wrong input."""

Item = TypeVar("Item")


class InputError(TokenpassError):
    """What a user gave to a command cannot be used; the message is one line and says what to do."""


def results() -> Console:
    """Stdout, as it is now."""
    return _console(sys.stdout)


def notes() -> Console:
    """Stderr, as it is now."""
    return _console(sys.stderr)


def _console(file: Any) -> Console:
    console = Console(file=file, highlight=False, markup=False)
    console.width = min(console.width, WIDEST)
    return console


def say(text: str) -> None:
    """A remark beside the result."""
    notes().print(Text(text, "dim"), soft_wrap=True)


def fail(message: str) -> int:
    """Print an error in one line; returns the exit code for wrong input."""
    notes().print(Text.assemble(("tokenpass: ", "red"), one_line(message)), soft_wrap=True)
    return WRONG


def one_line(message: object) -> str:
    """The lines of a message, joined."""
    return " ".join(str(message).split())


def print_json(value: Any) -> None:
    """The result for machines."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Show that something of unknown length goes on."""
    with notes().status(Text(text)):
        yield


def track(items: Iterable[Item], text: str, total: int | None = None) -> Iterator[Item]:
    """Go through ``items`` with a progress bar, which is gone at the end.

    Args:
        items: What to go through.
        text: What is being done.
        total: How many there are, where ``items`` has no length.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    count = len(items) if isinstance(items, Sequence) else total
    with Progress(*columns, console=notes(), transient=True) as progress:
        yield from progress.track(items, total=count, description=text)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to: it becomes ``path`` once it is complete, or is removed.

    Raises:
        InputError: If nothing can be written there.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
