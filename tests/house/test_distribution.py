"""Wheel and source distribution hold what is needed, and work where nothing else is."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.house.test_layers import MODULES, ROOT

pytestmark = pytest.mark.slow

USE = """
import pathlib, sys, warnings
import torch, tokenpass
assert pathlib.Path(tokenpass.__file__).is_relative_to(sys.prefix), tokenpass.__file__
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True, dropout=0)
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    def forward(self, x):
        return self.blocks(self.stem(x).flatten(2).transpose(1, 2))

model, images = Model(), torch.randn(1, 3, 32, 32)
fast = torch.compile(model, backend="tokenpass", options={"keep": 0.5, "inner": "eager"})
fast(images)
assert tokenpass.kept(fast).shape == (1, 32)
assert "patch tokens" in tokenpass.html_report(tokenpass.report(fast))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True)
    return folder


def test_wheel_holds_all_modules(built: Path) -> None:
    """Breaks if passes/ or patterns/ are left out of the package, or tests are put into it."""
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for module, path in MODULES.items():
        parts = module.replace(".", "/")
        expected = f"{parts}/__init__.py" if path.stem == "__init__" else f"{parts}.py"
        assert expected in names
    assert {"tokenpass/py.typed", "tokenpass/report_page.html"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tokenpass"}


def test_source_distribution_holds_all_folders(built: Path) -> None:
    """Breaks if what lies beside tokenpass/ in the repository is left out."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    files = {path.relative_to(ROOT).as_posix() for path in MODULES.values()}
    assert files | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= names


def test_wheel_works_in_a_clean_environment(built: Path, tmp_path: Path) -> None:
    """Breaks if the installed package misses a file. Dependencies come from this environment."""
    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    install: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
    ]
    subprocess.run([*install, "--no-deps", "--no-index", wheel], check=True)
    (packages,) = (tmp_path / "clean").glob("lib/python*/site-packages")
    ours = [entry for entry in sys.path if entry.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(ours))
    subprocess.run([python, "-c", USE], check=True, cwd=tmp_path)
