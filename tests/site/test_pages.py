"""The documentation is true: every block of Python runs, every command exists.

Blocks inside of HTML comments are what a page assumes; readers do not see them. The README's blocks
are run by tests/house/test_readme.py.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from benchmarks.data import DataMissingError, data_file
from tests.house.test_layers import ROOT
from tokenpass.logs import summary

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^(?:<!-- )?```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def blocks(page: str, *languages: str) -> list[tuple[int, str]]:
    """Line and text of a page's blocks in some languages."""
    text = (DOCS / page).read_text()
    return [
        (text.count("\n", 0, match.start()) + 2, match[2])
        for match in BLOCK.finditer(text)
        if match[1] in languages
    ]


@pytest.fixture
def pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights without a network: those of the data folder, random ones where there is none."""
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        model: nn.Module = create(name, **options)
        if pretrained:
            try:
                weights = torch.load(data_file(f"{name}.pt"), weights_only=True)
            except DataMissingError:
                return model
            model.load_state_dict(weights)
        return model

    monkeypatch.setattr(timm, "create_model", offline)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
@pytest.mark.usefixtures("pretrained")
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a page shows what does not work."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for line, code in blocks(page, "python"):
        shown = "\n" * (line - 1) + code  # so that a traceback names the line of the page
        exec(compile(shown, str(DOCS / page), "exec"), names)
    if page == "tutorial.md":
        assert summary(names["report"].graphs[0]) in (DOCS / "guides/reports.md").read_text()
    if page in ("tutorial.md", "guides/reports.md"):
        assert "<!doctype html>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    """Breaks if a block escapes the other tests because its language is unknown."""
    text = (DOCS / page).read_text()
    assert {match[1] for match in BLOCK.finditer(text)} <= {"python", "bash", "text"}
    assert text.count("```") == 2 * len(BLOCK.findall(text))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_commands_exist(page: str) -> None:
    """Breaks if a page names a target, an extra or a module that is gone."""
    for _, code in blocks(page, "bash"):
        for line in code.splitlines():
            words = [word for word in shlex.split(line, comments=True) if "=" not in word]
            if words:
                assert known(words), line


def known(words: list[str]) -> bool:
    """Whether a command can be given in this project."""
    match words:
        case ["make", *targets]:
            return set(targets) <= set(TARGETS)
        case ["pip", "install", *packages]:
            own = [re.fullmatch(r"tokenpass(?:\[(.*)\])?", package) for package in packages]
            asked = [extra for match in own if match and match[1] for extra in match[1].split(",")]
            return set(asked) <= set(EXTRAS)
        case ["python", "-m", module, *_]:
            return importlib.util.find_spec(module) is not None
        case ["python", script]:
            return script == "your_script.py"
    return False


def test_unknown_commands_are_noticed() -> None:
    """Breaks if the test above lets everything through."""
    for command in ("make nothing", "pip install tokenpass[nothing]", "python -m no_such", "rm x"):
        assert not known(command.split())
    assert known(["make", "demo"])
    assert known(["pip", "install", "tokenpass[test,lint]", "timm"])


def test_every_public_name_is_in_the_reference() -> None:
    """Breaks if a name is added and not documented."""
    import tokenpass

    text = (DOCS / "reference.md").read_text()
    modules = {"selectors"} | {name for name in vars(tokenpass.errors) if name.endswith("Error")}
    for name in set(tokenpass.__all__) - modules - {"TokenpassWarning"}:
        assert re.search(rf"tokenpass\.{name}\b|[\[ ]{name}[,\]]", text), name


def test_every_page_is_in_the_navigation() -> None:
    """Breaks if a page cannot be reached."""
    pages = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(pages) == PAGES
