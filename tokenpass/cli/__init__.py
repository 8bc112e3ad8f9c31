"""The command line ``tokenpass``: one module for each command. Needs the extra ``cli``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Default: those of the process.

    Returns:
        Exit code: 0 if all went well; 1 if the command looked and the answer is no (nothing would
        be converted, a check failed); 2 for wrong input, which one line on stderr names.
    """
    try:
        from tokenpass.cli.app import run
    except ModuleNotFoundError as error:
        lacks = f"the command line needs {error.name}"
        print(f"tokenpass: {lacks}: python -m pip install 'tokenpass[cli]'", file=sys.stderr)
        return 2
    return run(arguments)
