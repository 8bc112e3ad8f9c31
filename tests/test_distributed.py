"""Data in two processes: gradients are those of one process with all images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import distributed_worker as worker
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
Found = dict[str, tuple[dict[str, torch.Tensor], bool]]


def gradients(keep: float, folder: Path, *kinds: str) -> Found:
    """What two processes find together for each kind, and whether the model was rewritten there."""
    command = [sys.executable, "-m", "tests.distributed_worker"]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder), str(keep), *kinds], cwd=ROOT)
        for rank in range(worker.PROCESSES)
    ]
    assert [process.wait() for process in processes] == [0] * worker.PROCESSES
    return torch.load(folder / "found.pt")  # type: ignore[no-any-return]


def equal(found: dict[str, torch.Tensor], model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    """Breaks if a wrapped model is rewritten wrongly, or is not rewritten where it is one graph.

    DDP with small buckets and FSDP of each block make many graphs of the model: what is in them is
    left alone, and must be right.
    """
    model = worker.model()
    model(tiny.images(worker.IMAGES)).square().mean().backward()
    whole, split = ("ddp", "fsdp"), ("split ddp", "fsdp blocks")
    found = gradients(1.0, tmp_path, *whole, *split)
    for kind in (*whole, *split):
        equal(found[kind][0], model)
    assert all(found[kind][1] for kind in whole)


@pytest.mark.slow
def test_fewer_tokens_in_two_processes(tmp_path: Path) -> None:
    """Breaks if images of one process decide which tokens of another stay."""
    model = worker.model()
    worker.compiled(model, 0.5)(tiny.images(worker.IMAGES)).square().mean().backward()
    for found, converted in gradients(0.5, tmp_path, "ddp", "fsdp").values():
        equal(found, model)
        assert converted
