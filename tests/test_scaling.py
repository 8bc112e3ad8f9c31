"""The passes' cost grows with the nodes, not with their square."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import fx, nn

import tokenpass
from tests import tiny
from tokenpass.gated import gate_graph
from tokenpass.methods import Eventful, HiPrune, Method
from tokenpass.pipeline import rewrite

ROOT = Path(__file__).resolve().parents[1]
OWN = tuple(str(ROOT / folder) for folder in ("tokenpass", "passes", "patterns"))

METHODS: dict[str, Method] = {"pruning": HiPrune(keep=0.5), "gating": Eventful(keep=0.25)}


def steps(depth: int, method: Method) -> int:
    """How many calls of our own functions a model of some blocks takes: no clock is involved."""
    counted = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal counted
        counted += event == "call" and frame.f_code.co_filename.startswith(OWN)

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        sys.setprofile(count)
        try:
            if isinstance(method, Eventful):
                gate_graph(module, inputs, method, always=True)
            else:
                rewrite(module, inputs, method, always=True)
        finally:
            sys.setprofile(None)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(tiny.encoder(depth=depth), backend=backend, dynamic=False)(tiny.images(1))
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_work_grows_with_depth(name: str) -> None:
    """Breaks if a pass looks at all nodes for each node: then 24 blocks take four times as many
    steps as 12. A linear pass takes twice as many."""
    few, some, many = (steps(depth, METHODS[name]) for depth in (6, 12, 24))
    assert few > 0
    assert (many - some) / (some - few) < 2.3
    assert many / some < 2.2


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_giant_on_the_meta_device(name: str) -> None:
    """ViT-g/14: 40 blocks of width 1408. Measured: see docs/architecture.md."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_giant_patch14_dinov2", img_size=224).eval()
        images = torch.randn(1, 3, 224, 224)
    start = time.process_time()
    with torch.no_grad():
        report = tokenpass.explain(model, images, method=METHODS[name])
    assert len(report.blocks) == 40
    assert report.converted
    assert time.process_time() - start < 120  # of a crowded machine; alone it takes a tenth
