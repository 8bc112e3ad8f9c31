"""How fast this machine is: seconds per operation and per byte, measured once and remembered.

Nothing is measured unless :func:`calibrate` is called. What it finds is kept in the user's cache
folder (``TOKENPASS_CACHE``, else ``XDG_CACHE_HOME``, else ``~/.cache``), for each device, number of
threads and version of torch.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROUNDS = 7
IMAGES, TOKENS, WIDTH, HEADS = 8, 196, 384, 6
"""Of what is timed: layers of a small vision transformer on a batch."""

EXPANSION = 4
LONG = 784
"""Tokens of the attention that is timed."""


@dataclass(frozen=True)
class Load:
    """What a graph asks of a machine.

    Attributes:
        linear: Floating-point operations of products with weights, and of convolutions.
        attention: The same where tokens are compared with tokens.
        bytes: Of all values that arithmetic makes.
    """

    linear: int
    attention: int
    bytes: int


@dataclass(frozen=True)
class Calibration:
    """Speed of a machine.

    Attributes:
        machine: The device, its threads, and the version of torch.
        linear: Seconds per floating-point operation of a linear layer.
        attention: The same of fused attention.
        byte: Seconds per byte that elementwise operations write.
    """

    machine: str
    linear: float
    attention: float
    byte: float

    def seconds(self, load: Load) -> float:
        """A prediction of what a load takes."""
        return load.linear * self.linear + load.attention * self.attention + load.bytes * self.byte


def calibrate(device: torch.device | str = "cpu") -> Calibration:
    """Measure this machine, about a second, and remember it.

    From then on :func:`tokenpass.explain` shows what it predicts a call to take, with as many
    threads as now.

    Args:
        device: Where models run.
    """
    where = torch.device(device)
    with torch.no_grad():
        found = Calibration(
            machine_name(where), _linear(where), _attention(where), _elementwise(where)
        )
    path = _path(found.machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return found


def calibrated(device: torch.device) -> Calibration | None:
    """What :func:`calibrate` measured on this machine; ``None`` if it did not, or not readably."""
    name = machine_name(device)
    try:
        values: dict[str, Any] = json.loads(_path(name).read_text(encoding="utf-8"))
        found = Calibration(**values)
    except (OSError, ValueError, TypeError):
        return None
    return found if found.machine == name else None


def machine_name(device: torch.device) -> str:
    """The device, its threads, and the version of torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    processor = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{platform.node()}, {processor}, {threads} threads, torch {torch.__version__}"


def _path(machine: str) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenpass"
    folder = Path(os.environ.get("TOKENPASS_CACHE") or default)
    safe = "".join(letter if letter.isalnum() else "-" for letter in machine)
    return folder / f"calibration-{safe}.json"


def _linear(device: torch.device) -> float:
    x = torch.randn(IMAGES * TOKENS, WIDTH, device=device)
    up = torch.randn(EXPANSION * WIDTH, WIDTH, device=device)
    operations = 2 * 2 * x.shape[0] * up.numel()
    down, bias = up.t().contiguous(), up.new_zeros(EXPANSION * WIDTH)

    def mlp() -> Tensor:
        return functional.linear(functional.linear(x, up, bias), down)

    return _median_seconds(mlp, device) / operations


def _attention(device: torch.device) -> float:
    joint = torch.randn(IMAGES // 4, LONG, 3, HEADS, WIDTH // HEADS, device=device)
    query, key, value = joint.permute(2, 0, 3, 1, 4)
    operations: int = 2 * 2 * query.numel() * LONG

    def attention() -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value)

    return _median_seconds(attention, device) / operations


def _elementwise(device: torch.device) -> float:
    x = torch.randn(IMAGES * TOKENS, EXPANSION * WIDTH, device=device)
    return _median_seconds(lambda: functional.gelu(x), device) / (x.numel() * x.element_size())


def _median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call until the device is done, after one that warms up."""
    seconds = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
