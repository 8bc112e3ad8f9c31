"""The package as a user gets it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

import tokenpass
from tests.house.test_layers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_entry_point() -> None:
    """Breaks if the backend's name is not declared, or leads nowhere."""
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="tokenpass")
    assert callable(entry.load())


def test_versions_agree() -> None:
    """Breaks if a release changes one of them only."""
    assert tokenpass.__version__ == PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE) == [PROJECT["version"]]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\d.*)$", changes, flags=re.MULTILINE)[0] == PROJECT["version"]


def test_citation_and_issue_forms_are_what_their_readers_take() -> None:
    """Breaks if one of them is no YAML, or lacks what GitHub asks for."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys(), path.name
        for item in form["body"]:
            assert item["type"] in ("textarea", "input"), path.name
            assert item["id"], path.name
            assert item["attributes"]["label"], path.name


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
