"""Importing tokenpass stays light: what only some commands need is not loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("typer", "matplotlib", "PIL", "av", "timm", "transformers", "torchvision")


@pytest.mark.parametrize("module", ["tokenpass", "tokenpass.config", "tokenpass.budgets"])
def test_import_loads_nothing_for_the_command_line(module: str) -> None:
    """Breaks if a plot or a command is imported with the package."""
    code = f"import sys, {module}; print(*(n for n in {HEAVY} if n in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.slow
def test_plot_comes_when_it_is_used() -> None:
    """Breaks if ``tokenpass.plot`` needs an import of its own."""
    code = "import tokenpass; print(tokenpass.plot.tokens.__module__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "tokenpass.plot.pictures"


def test_missing_extras_are_named() -> None:
    """Breaks if the command line of a bare install ends in a traceback."""
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "from tokenpass.cli import main; sys.exit(main(['doctor']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.strip() == (
        "tokenpass: the command line needs typer: python -m pip install 'tokenpass[cli]'"
    )
