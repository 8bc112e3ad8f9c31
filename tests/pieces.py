"""Models that Dynamo makes several graphs of, compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tokenpass
from tokenpass import Eventful, HiPrune

QUIET = pytest.mark.filterwarnings("ignore:tokenpass. nothing to convert")
"""In the graph that only embeds patches, say."""


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def pruned(model: Callable[..., Any], keep: float = 0.5, **options: Any) -> Any:
    method = HiPrune(keep=keep, **options)
    backend = tokenpass.backend(method, inner="eager", always_rewrite=True, record_cuts=True)
    return torch.compile(model, backend=backend)


def gated(model: Callable[..., Any], keep: float) -> Any:
    method = Eventful(keep=keep, scene_cut=None)
    return torch.compile(model, backend=tokenpass.backend(method, inner="eager"))
