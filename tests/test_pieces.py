"""A model in pieces: what lies behind a graph break is gated as far as it treats tokens alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tokenpass
from tests import tiny
from tests.zoo import relative_error

WIDE = 64
"""Hidden channels: a gate must save more than it costs."""


class Broken(tiny.Attention):
    """Attention that Dynamo cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        q, k, v = self.project(x)
        out: Tensor = self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        torch._dynamo.graph_break()
        return out


class Head(nn.Module):
    """Blocks behind breaks, then one answer for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny.encoder(Broken, lambda: tiny.Mlp(tiny.WIDTH, WIDE))
        self.head = tiny.Mlp(tiny.WIDTH, WIDE)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.encoder(x).mean(1)
        torch._dynamo.graph_break()
        out: Tensor = self.head(pooled)
        return out


def test_pieces_are_gated() -> None:
    model, images = Head(), tiny.images()
    with torch.no_grad():
        report = tokenpass.explain(model, images, method=tokenpass.Eventful(keep=0.5))
    assert len(report.graphs) > 1
    assert report.converted
    assert report.flops < report.flops_before


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_images_are_no_tokens(keep: float) -> None:
    """Breaks if a head that sees one row for each image updates a share of the images only."""
    head, pooled = tiny.Mlp(tiny.WIDTH, WIDE).eval(), torch.randn(8, tiny.WIDTH)
    backend = tokenpass.backend(tokenpass.Eventful(keep=keep), inner="eager", always_rewrite=True)
    fast = torch.compile(head, backend=backend)
    with torch.no_grad():
        with pytest.warns(tokenpass.TokenpassWarning, match="nothing to convert"):
            fast(pooled)
        for rows in (pooled, pooled + 1.0, pooled * 2.0):
            assert relative_error(fast(rows), head(rows)) == 0.0
