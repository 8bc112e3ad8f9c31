"""The package as a user gets it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import tokenpass
from tests.house.test_layers import MODULES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_entry_point() -> None:
    """Breaks if the backend's name is not declared, or leads nowhere."""
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="tokenpass")
    assert callable(entry.load())


def test_versions_agree() -> None:
    """Breaks if a release changes one of them only."""
    assert tokenpass.__version__ == PROJECT["version"]


def test_pins_satisfy_the_ranges() -> None:
    """Breaks if CI runs on something that pyproject.toml excludes, or does not pin it at all."""
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(item for extra in extras for item in extra)]
    for requirement in map(Requirement, wanted):
        assert requirement.name in pins, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pins[requirement.name])


def test_public_names_exist_and_are_documented() -> None:
    """Breaks if ``__all__`` names something that is missing or has no docstring."""
    for name in tokenpass.__all__:
        assert getattr(tokenpass, name).__doc__


def test_another_torch_is_refused() -> None:
    """Breaks if an untried torch is worked with in silence."""
    code = "import torch; torch.__version__ = '2.99.0'; import tokenpass"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode != 0
    assert re.search(r"torch 2\.13, found 2\.99\.0: install", found.stderr)


@pytest.mark.slow
def test_wheel_holds_all_modules(tmp_path: Path) -> None:
    """Breaks if passes/ or patterns/ are left out of the package, or tests are put into it."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", tmp_path, ROOT], check=True, text=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for module, path in MODULES.items():
        parts = module.replace(".", "/")
        expected = f"{parts}/__init__.py" if path.stem == "__init__" else f"{parts}.py"
        assert expected in names
    assert "tokenpass/py.typed" in names
    assert not any(name.startswith(("tests", "benchmarks", "passes")) for name in names)
