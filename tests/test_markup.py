"""Pieces of HTML: what is text stays text, and the figure shows the numbers it was given."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from tokenpass import markup
from tokenpass.markup import Flow

SVG = "{http://www.w3.org/2000/svg}"


def bars(svg: str) -> list[tuple[str, float]]:
    """Colour and height of each bar."""
    found = re.findall(r'<rect [^>]*height="([\d.]+)" fill="(#\w+)"', svg)
    return [(colour, float(height)) for height, colour in found]


def test_text_is_escaped() -> None:
    """Breaks if a reason or a file name could become markup."""
    nasty = '<script>&"'
    for piece in (
        markup.table([nasty], [[nasty]]),
        markup.details(nasty, ""),
        markup.preformatted([nasty]),
    ):
        assert "<script" not in piece
        assert "&lt;script&gt;&amp;&quot;" in piece


def test_bars_are_as_high_as_the_tokens() -> None:
    """Breaks if the figure shows other numbers, or forgets what leaves the last block."""
    svg = markup.flow_figure([Flow(100, 100, None), Flow(100, 50, None), Flow(50, 20, None)])
    ElementTree.fromstring(svg)
    heights = [height for _, height in bars(svg)]
    assert heights[0] > 0
    assert heights == pytest.approx([heights[0] * share for share in (1, 1, 0.5, 0.2)], abs=0.1)
    assert re.findall(r'middle">(\w+)</text>', svg) == ["100", "1", "2", "50", "3", "20", "out"]


def test_what_is_computed_anew_is_a_part_of_the_bar() -> None:
    """Breaks if gating looks as if tokens left."""
    svg = markup.flow_figure([Flow(100, 100, 25)])
    (blue, whole), (orange, part), (_, end) = bars(svg)
    assert (blue, orange) == (markup.BLUE, markup.ORANGE)
    assert part == pytest.approx(whole / 4, abs=0.1)
    assert end == whole
    assert "25 computed anew" in svg


@pytest.mark.parametrize("depth", [1, 24, 25, 100])
def test_labels_do_not_crowd(depth: int) -> None:
    """Breaks if a deep model's block numbers overlap."""
    svg = markup.flow_figure([Flow(9, 9, None)] * depth)
    numbers = re.findall(rf'y="{markup.HEIGHT - markup.BOTTOM + 15}.0" [^>]*>(\d+)<', svg)
    assert len(numbers) <= markup.LABELS
    assert numbers[0] == "1"


def test_a_model_without_blocks_has_no_figure() -> None:
    """Breaks if an empty report cannot be shown."""
    assert markup.flow_figure([]) == ""
