"""``tokenpass fuzz``: generated encoders against their properties, from a checkout."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from tokenpass.cli import choice
from tokenpass.cli.screen import NO, InputError, notes, print_json, results
from tokenpass.errors import described

FUZZER = Path("tests", "fuzz", "__main__.py")


def command(
    seconds: Annotated[float, typer.Option(help="How long.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Others give other encoders.")] = 0,
    cases: Annotated[int | None, typer.Option(help="Stop after so many.")] = None,
    failures: Annotated[Path, typer.Option(help="Where failing cases go, as tests.")] = Path(
        "fuzz-failures"
    ),
    as_json: choice.Json = False,
) -> int:
    """Generate encoders and hold the passes to their properties; run it in a checkout.

    Exit code 1: there were failures.
    """
    if not FUZZER.is_file():
        raise InputError(f"there is no {FUZZER} here: run this in a checkout of tokenpass")
    sys.path.insert(0, str(Path.cwd()))
    try:
        fuzzer = import_module("tests.fuzz.__main__")
    except Exception as error:
        raise InputError(f"the fuzzer cannot be imported ({described(error)})") from error
    tally = fuzzer.watched(notes(), seconds, seed, failures, most=cases)
    if as_json:
        found = {error: str(path) for error, path in tally.failures.items()}
        print_json(
            {
                "cases": tally.cases,
                "seconds": tally.seconds,
                **tally.counts,
                "repeats": tally.repeats,
                "failures": found,
            }
        )
    else:
        results().print(fuzzer.summary(tally))
    return NO if tally.failures else 0
