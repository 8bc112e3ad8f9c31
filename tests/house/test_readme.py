"""The README is true: its example runs, its commands and defaults exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.test_layers import ROOT
from tokenpass.methods import CUTS, DEFAULT_KEEP, Eventful, HiPrune

README = (ROOT / "README.md").read_text()
DECLARE = "import tests.conftest\n"  # torchvision on a CPU build of torch


@pytest.mark.inductor
def test_example_runs(tmp_path: Path) -> None:
    """Breaks if the example uses anything that is not there."""
    blocks = re.findall(r"<!-- run by .*? -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        script = tmp_path / "example.py"
        script.write_text(DECLARE + block)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, script], check=True, env=environment)


def test_commands_exist() -> None:
    """Breaks if a make target is renamed."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"\bmake (\w+)(?=\s|`| +#)", text):
            assert target in targets, target


def test_defaults_are_the_code_s() -> None:
    """Breaks if a default changes and the README does not."""
    rows = options(README.split("### Video")[0])
    assert float(rows["keep"]) == DEFAULT_KEEP
    assert float(rows["alpha"]) == HiPrune().alpha
    assert rows["where"] == '`"encoder"`'
    assert HiPrune().where == "encoder"
    assert HiPrune().merges
    assert HiPrune().restores
    assert not HiPrune(where="output").merges
    assert not HiPrune(where="output").restores
    assert "four cuts" in rows["stages"]
    assert CUTS == 4


def test_defaults_of_gating_are_the_code_s() -> None:
    """Breaks if a default changes and the README does not."""
    rows, method = options(README.split("### Video")[1]), Eventful()
    for name in ("keep", "norm", "scene_cut", "max_streams"):
        assert float(rows[name]) == getattr(method, name), name
    assert rows["attention"] == f'`"{method.attention}"`'
    assert rows["threshold"] == "none"
    assert method.threshold is None
    assert rows["gate_before_norm"] == rows["compat"] == "`False`"
    assert not method.gate_before_norm
    assert not method.compat


def options(text: str) -> dict[str, str]:
    """The first two cells of each row of a table of options."""
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", text, flags=re.MULTILINE))


def test_links_lead_somewhere() -> None:
    """Breaks if a file that is linked to is moved."""
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
