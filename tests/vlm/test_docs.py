"""docs/vlm.md and examples/vlm.py run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenpass
from examples.vlm import main
from tests.vlm.families import FAMILIES, prompts
from tokenpass import HiPrune, selectors

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "vlm.md").read_text()


def test_selector_of_the_docs() -> None:
    """Breaks if the worked selector does not fit the interface."""
    (block,) = re.findall(r"<!-- run by .*? -->\n```python\n(.*?)```", DOCS, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    fast = tokenpass.vlm(FAMILIES["llava"].build(), HiPrune(keep=7), selector=names["largest"])
    with torch.no_grad():
        fast(**prompts(FAMILIES["llava"], [1]))
    assert [len(kept) for kept in fast.kept()] == [7]


def test_all_selectors_are_listed() -> None:
    """Breaks if a selector is added and the page does not say so."""
    for name in selectors.__all__:
        assert f"`{name}`" in DOCS


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if the example does not run without a network, or a full budget changes answers."""
    main(["--steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("3/3")
    assert "64/576" in lines[4]


def test_importing_needs_no_model_library() -> None:
    """Breaks if tokenpass cannot be used without the optional library."""
    code = "import sys, tokenpass; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
