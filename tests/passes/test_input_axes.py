"""Which axes of an input are images: those along which nothing meets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.captured import Traced, trace
from tokenpass.dims import Axis
from tokenpass.passes.input_axes import image_axes

IMAGES, SIDE, WIDTH = 3, 4, 8


class Pixels(nn.Module):
    """Pixels ``(B, 8, 4, 4)`` and a class token attend with two groups of keys and values.

    Args:
        together: Whether all images are one sequence.
    """

    def __init__(self, *, together: bool) -> None:
        super().__init__()
        self.together = together
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.permute(0, 2, 3, 1).reshape(IMAGES, -1, WIDTH)
        rows = torch.cat([self.token.expand(IMAGES, -1, -1), rows], 1)
        rows = rows.reshape(1, -1, WIDTH) if self.together else rows
        q = self.q(rows).unflatten(-1, (4, -1)).transpose(1, 2).flatten(0, 1)
        k, v = self.kv(rows).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
        k, v = (y.repeat_interleave(2, 1).flatten(0, 1) for y in (k, v))
        out: Tensor = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
        return out


def found_in(model: nn.Module) -> tuple[frozenset[Axis], list[Axis]]:
    """What is taken for images, and the axes of the input."""
    traced: Traced = trace(model.eval(), torch.randn(IMAGES, WIDTH, SIDE, SIDE))
    (dims,) = (
        traced.facts.dims(node)
        for node in traced.graph.find_nodes(op="placeholder")
        if node not in traced.analysis.captured.constants
    )
    return image_axes(traced.facts), [factor.axis for dim in dims for factor in dim]


def test_images_stay_apart_where_heads_are_grouped() -> None:
    """Breaks if queries and repeated keys, whose heads are counted in other ways, lose what they
    have in common."""
    images, axes = found_in(Pixels(together=False))
    assert images == {axes[0]}


def test_rows_of_a_sequence_are_no_images() -> None:
    """Breaks if what a sequence is put together from is taken for something that never meets."""
    images, axes = found_in(Pixels(together=True))
    assert images.isdisjoint((axes[0], *axes[2:]))
