"""Makes failing cases as plain as they get, and writes them down as regression tests."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha1
from pathlib import Path

from tests.fuzz.properties import BrokenPropertyError, check
from tests.fuzz.spec import Case, simpler

KIND = 80
"""Letters of an error that tell its kind, without numbers."""


def error_of(case: Case) -> str:
    """What goes wrong, in a line; empty if nothing does."""
    try:
        check(case)
    except Exception as error:
        return described(error)
    return ""


def described(error: Exception) -> str:
    """An exception in a line; of one that Dynamo wraps, what it wraps."""
    inner = getattr(error, "inner_exception", error)
    kind = "" if isinstance(inner, BrokenPropertyError) else f"{type(inner).__name__}: "
    return kind + (str(inner).splitlines() or [""])[0]


def same_kind(a: str, b: str) -> bool:
    """Whether two errors begin with the same words."""
    first, second = (re.sub(r"[\d\W]+", " ", text)[:KIND] for text in (a, b))
    return first == second


def plainer(case: Case) -> Iterator[Case]:
    """Cases that are plainer in one thing."""
    yield from (replace(case, encoder=encoder) for encoder in simpler(case.encoder))
    yield from (other for other in _plainer_budget(case) if other != case)


def _plainer_budget(case: Case) -> Iterator[Case]:
    yield replace(case, keep=Case.keep)
    yield replace(case, also=Case.also)


def simplified(case: Case, error: str, seconds: float) -> Case:
    """The plainest case that was found in some time to fail in the same way."""
    deadline = time.monotonic() + seconds
    progress = True
    while progress:
        progress = False
        for other in plainer(case):
            if time.monotonic() > deadline:
                return case
            if same_kind(error_of(other), error):
                case, progress = other, True
                break
    return case


def write_test(case: Case, error: str, folder: Path) -> Path:
    """A test file with a failing case; one and the same for one and the same case."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"test_{sha1(str(case).encode()).hexdigest()[:8]}.py"
    path.write_text(
        f'"""Found by fuzzing: {error[:200]}"""\n\n'
        "from tests.fuzz.properties import check\n"
        "from tests.fuzz.spec import Attention, Block, Case, Encoder  # noqa: F401\n\n\n"
        f"def test_case() -> None:\n    check({case})\n"
    )
    return path
