"""Where a dimension carries the patch tokens of an image, and where it only looks so."""

from __future__ import annotations

import sympy

from tokenpass.dims import Axis, AxisTable, Dim, Kind, whole
from tokenpass.grid import Grid


def positions(size: int) -> Dim:
    return whole(Axis(Kind.SPATIAL, sympy.Integer(size), None, True))


ROWS, COLUMNS, FRAMES = positions(4), positions(5), positions(3)
GRID = Grid((*ROWS, *COLUMNS))


def test_a_prefix_beside_the_grid() -> None:
    sequence = AxisTable().concat([(), GRID.dim], None)
    assert GRID.carried_by(sequence)
    assert GRID.layout(sequence) == [1, None]
    assert GRID.resized(sequence, sympy.Integer(7)) == 8


def test_a_prefix_beside_frames() -> None:
    """Breaks if the frames of a clip are forgotten when its tokens lie behind a class token."""
    sequence = AxisTable().concat([(), (*FRAMES, *GRID.dim)], None)
    assert not GRID.carried_by(sequence)
    assert GRID.shredded_in((sequence,))


def test_frames_alone() -> None:
    """Every frame has a grid of its own, as every image has."""
    assert GRID.carried_by((*FRAMES, *GRID.dim))
    assert GRID.resized((*FRAMES, *GRID.dim), sympy.Integer(7)) == 21
