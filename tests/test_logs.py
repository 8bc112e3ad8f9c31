"""Logs and traces are where PyTorch's users look for them.

Each test runs a process of its own: the variables are read when torch is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.test_layers import ROOT

PRUNING = "tokenpass.HiPrune(keep=0.5)"
GATING = "tokenpass.Eventful(keep=0.5)"

CODE = """
import logging, sys, warnings
import torch, tokenpass
from tests import tiny
{before}
model = tiny.encoder(depth=4)
fast = torch.compile(model, backend=tokenpass.backend({method}, inner="eager"))
with torch.inference_mode():
    for _ in range({calls}):
        fast(tiny.images())
"""

LINE = re.compile(r"(\d+)/4 blocks, (\d\.\d\d) of the FLOPs, (\d+) refusals?; patch tokens: 16 in")


def printed(method: str = PRUNING, before: str = "", **environment: str | Path) -> str:
    """What a process that compiles an encoder of four blocks prints on the error stream."""
    code = CODE.format(method=method, before=before, calls=2)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCH")}
    variables = {
        **inherited,
        "PYTHONPATH": str(ROOT),
        **{k: str(v) for k, v in environment.items()},
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_silent_unless_asked() -> None:
    """Breaks if a compilation prints what nobody asked for."""
    assert printed() == ""


@pytest.mark.slow
def test_one_line_for_a_compilation() -> None:
    """Breaks if the log is not reached by TORCH_LOGS, or a second call logs again."""
    (line,) = printed(TORCH_LOGS="tokenpass").splitlines()
    found = LINE.search(line)
    assert found is not None
    changed, share, refusals = found.groups()
    assert changed == "3"
    assert 0.5 < float(share) < 1.0
    assert refusals == "0"
    assert line.endswith("8 out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "graphs"),
    [(PRUNING, ["before", "after"]), (GATING, ["before", "full", "incremental"])],
)
def test_graphs_in_detail(method: str, graphs: list[str]) -> None:
    """Breaks if the graphs are missing, or are not code that can be read."""
    text = printed(method, TORCH_LOGS="+tokenpass")
    assert len(LINE.findall(text)) == 1
    assert re.findall(r"graph, (\w+):$", text, flags=re.MULTILINE) == graphs
    assert text.count("def forward(self") == len(graphs)
    operators = {PRUNING: "tokenpass.most_similar", GATING: "aten.index"}
    before, after = text.split(f"graph, {graphs[1]}:")
    assert operators[method] not in before
    assert operators[method] in after


@pytest.mark.slow
def test_python_s_own_logging() -> None:
    """Breaks if the log is not an ordinary one."""
    (line,) = printed(before="logging.basicConfig(level=logging.INFO)").splitlines()
    assert line.startswith("INFO:tokenpass:3/4 blocks")


@pytest.mark.slow
def test_a_rewrite_that_is_undone_is_a_refusal() -> None:
    """Breaks if a failure is logged as success."""
    broken = """
warnings.simplefilter("ignore")
from tokenpass import pipeline
def fail(*args): raise RuntimeError("on purpose")
pipeline.check_rewrite = fail
"""
    (line,) = printed(before=broken, TORCH_LOGS="tokenpass").splitlines()
    assert "0/4 blocks, 1.00 of the FLOPs, 1 refusal; patch tokens: 16 in, 16 out" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "graphs"),
    [(PRUNING, ["before", "after"]), (GATING, ["before", "full", "incremental"])],
)
def test_artifacts_of_a_trace(method: str, graphs: list[str], tmp_path: Path) -> None:
    """Breaks if tlparse would not find the report and the graphs under their compilation."""
    printed(method, TORCH_TRACE=tmp_path)
    (trace,) = tmp_path.iterdir()
    records = [
        json.loads(line.split("] ", 1)[1])
        for line in trace.read_text().splitlines()
        if '"name": "tokenpass_' in line
    ]
    names = [record["artifact"]["name"] for record in records]
    assert names == ["tokenpass_report", *(f"tokenpass_graph_{name}" for name in graphs)]
    assert all(record["frame_id"] == 0 for record in records)
    assert all(record["has_payload"] for record in records)
