"""Data in two processes: gradients are those of one process with all images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import distributed_worker as worker
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


def gradients(kind: str, keep: float, folder: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """What two processes find together, and whether the model was rewritten there."""
    command = [sys.executable, "-m", "tests.distributed_worker", kind, str(keep)]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT)
        for rank in range(worker.PROCESSES)
    ]
    assert [process.wait() for process in processes] == [0] * worker.PROCESSES
    found = torch.load(folder / "found.pt")
    return found["gradients"], found["converted"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "split ddp", "fsdp", "fsdp blocks"])
def test_gradients_are_those_of_one_process(kind: str, tmp_path: Path) -> None:
    """Breaks if a wrapped model is rewritten wrongly, or is not rewritten where it is one graph.

    DDP with small buckets and FSDP of each block make many graphs of the model: what is in them is
    left alone, and must be right.
    """
    model = worker.model()
    model(tiny.images(worker.IMAGES)).square().mean().backward()
    found, converted = gradients(kind, 1.0, tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-5)
    assert converted or kind in ("split ddp", "fsdp blocks")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fewer_tokens_in_two_processes(kind: str, tmp_path: Path) -> None:
    """Breaks if images of one process decide which tokens of another stay."""
    model = worker.model()
    fast = worker.compiled(model, 0.5)
    fast(tiny.images(worker.IMAGES)).square().mean().backward()
    found, converted = gradients(kind, 0.5, tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-5)
    assert converted
