"""Makes failing cases as plain as they get, and writes them down as regression tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha1
from pathlib import Path

from tests.fuzz.properties import Case, Failure, check
from tests.fuzz.spec import simpler


def error_of(case: Case) -> str:
    """The first line of what goes wrong; empty if nothing does."""
    try:
        check(case)
    except Exception as error:
        kind = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
        return kind + (str(error).splitlines() or [""])[0]
    return ""


def same_kind(a: str, b: str) -> bool:
    """Whether two errors are of one property, or of one kind of exception."""
    return bool(a) and a.split(":")[0] == b.split(":")[0]


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
        "from tests.fuzz.properties import Case, check\n"
        "from tests.fuzz.spec import Attention, Block, Encoder  # noqa: F401\n\n\n"
        f"def test_case() -> None:\n    check({case})\n"
    )
    return path
