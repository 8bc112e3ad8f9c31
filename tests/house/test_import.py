"""``import tokenpass`` is quick, touches no device, and hides no function."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import tokenpass

SECONDS = 0.3
"""What the import may take beyond torch's own, its counter of FLOPs included: CPU time, which other
processes do not change."""

TRIES = 3

CODE = """
import json, sys, time, torch.utils.flop_counter
before = set(sys.modules)
begun = time.process_time()
import tokenpass
took = time.process_time() - begun
loaded = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"took": took, "loaded": loaded, "cuda": torch.cuda.is_initialized()}))
"""


def importing() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_import_is_light() -> None:
    """Breaks if the package loads sympy, rich or a plotting library, or asks for a GPU."""
    found = importing()
    times = [found["took"]]
    while times[-1] > SECONDS and len(times) < TRIES:
        times.append(importing()["took"])
    assert min(times) <= SECONDS, times
    assert set(found["loaded"]) <= {"tokenpass", "torch", *sys.stdlib_module_names}
    assert not found["cuda"]


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_functions_are_not_hidden_by_modules() -> None:
    """Breaks if the entry point, which loads ``tokenpass.backend``, leaves a module there."""
    for name in tokenpass.FUNCTIONS:
        code = f"import tokenpass.{name}, tokenpass, types"
        run(f"{code}; assert isinstance(tokenpass.{name}, types.FunctionType)")


def test_public_names_that_modules_have_too_are_listed() -> None:
    """Breaks if a function gets the name of its module: importing that would hide it."""
    modules = {name.partition(".")[2] for name in sys.modules if name.startswith("tokenpass.")}
    public = {name for name in tokenpass.__all__ if name in modules}
    functions = {name for name in public if not isinstance(getattr(tokenpass, name), ModuleType)}
    assert functions == set(tokenpass.FUNCTIONS)


def test_operators_are_registered() -> None:
    """Breaks if a saved program that uses an operator cannot be loaded after the import."""
    from tests.house.test_layers import MODULES

    registering = {
        name for name, path in MODULES.items() if "@torch.library.custom_op" in path.read_text()
    }
    assert registering == {module.__name__ for module in tokenpass.OPERATORS}
    run("import torch, tokenpass; torch.ops.tokenpass.most_similar")


def test_unknown_names_are_attribute_errors() -> None:
    """Breaks if a name that does not exist is anything but an ``AttributeError``."""
    assert not hasattr(tokenpass, "no_such_name")
    assert {"backend", "HiPrune", "__version__"} <= set(dir(tokenpass))
