"""Shared set-up: seeds, threads, hypothesis profiles, and torchvision on a CPU build of torch."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# torchvision's wheel is built for CUDA: with a CPU build of torch its C extension does not load,
# and importing it fails while it registers fake kernels for two operators nobody has declared.
_DECLARED: list[torch.library.Library] = []


def declare_torchvision_operators() -> None:
    """Let ``import torchvision`` (and so timm) work without its C extension."""
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)


declare_torchvision_operators()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm  # noqa: F401
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("ci", derandomize=True, max_examples=10, **_COMMON)
settings.register_profile("long", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--first-cases", action="store_true", help="of each test only the first of its cases"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--first-cases"):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    chosen = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = first.values()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Every test compiles anew, with the same random numbers, on one thread."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()
