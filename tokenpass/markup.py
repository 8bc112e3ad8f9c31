"""Pieces of HTML and SVG from plain data; knows nothing of reports.

Everything that is passed as text is escaped. The figure's colours are told apart by people with any
colour vision (Okabe and Ito), and text takes the colour of the page around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

STYLE = """
.tokenpass { font: 14px/1.45 system-ui, sans-serif; max-width: 60rem; }
.tokenpass table { border-collapse: collapse; width: 100%; }
.tokenpass th, .tokenpass td { text-align: left; padding: .15rem .8rem .15rem 0;
  border-bottom: 1px solid #8884; vertical-align: top; }
.tokenpass summary { cursor: pointer; padding: .2rem 0; }
.tokenpass pre { overflow-x: auto; background: #8881; padding: .5rem; white-space: pre-wrap; }
.tokenpass svg { max-width: 100%; height: auto; }
.tokenpass .scroll { overflow-x: auto; }
"""

BLUE, ORANGE = "#0072b2", "#e69f00"

WIDTH, HEIGHT = 640, 190
LEFT, TOP, BOTTOM = 46, 30, 34
GAP = 2
"""Pixels of the figure, its margins, and between two bars."""

LABELS = 24
"""Most block numbers that are written under the bars."""


class Flow(NamedTuple):
    """Patch tokens of one block: those it computes on, those after it, those computed anew."""

    entering: int
    leaving: int
    updated: int | None


def text(value: object) -> str:
    return escape(str(value))


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th scope=col>{text(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """What opens when its summary is pressed; ``body`` is HTML."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def preformatted(lines: Iterable[str]) -> str:
    return f"<pre>{text(chr(10).join(lines))}</pre>"


def flow_figure(blocks: Sequence[Flow]) -> str:
    """Patch tokens through the depth of a model as an SVG: one bar for each block, and the end.

    A bar is as high as the tokens that the block computes on; where a block computes only some of
    them anew, that part is orange. A number stands over each bar that differs from the one before.
    """
    if not blocks:
        return ""
    most = max((block.entering for block in blocks), default=0) or 1
    bars = [*blocks, Flow(blocks[-1].leaving, blocks[-1].leaving, None)]
    pitch = (WIDTH - LEFT) / len(bars)
    scale = (HEIGHT - TOP - BOTTOM) / most
    every = -(-len(blocks) // LABELS)
    drawn: list[str] = []
    for number in range(len(bars)):
        drawn += _bar(bars, number, LEFT + number * pitch, pitch - GAP, scale)
        last = number == len(blocks)
        if last or number % every == 0:
            name = "out" if last else str(number + 1)
            drawn.append(_label(LEFT + (number + 0.5) * pitch, HEIGHT - BOTTOM + 15, name))
    base = HEIGHT - BOTTOM
    axes = (
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{base}" y2="{base}" stroke="currentColor"/>'
        f'<text x="{LEFT - 6}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{most}</text>'
        f'<text x="0" y="12">patch tokens at each block</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 4}">block{_legend(blocks)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="patch tokens at each block" font-size="12" fill="currentColor">'
        f"{axes}{''.join(drawn)}</svg>"
    )


def _bar(bars: Sequence[Flow], number: int, x: float, width: float, scale: float) -> list[str]:
    bar, last = bars[number], number == len(bars) - 1
    name = "after the last block" if last else f"block {number + 1}"
    said = f"{name}: {bar.entering} patch tokens"
    if bar.updated is not None:
        said += f", {bar.updated} computed anew"
    drawn = [_rectangle(x, width, bar.entering * scale, BLUE, 0.45 if last else 1, said)]
    if bar.updated is not None:
        drawn.append(_rectangle(x, width, bar.updated * scale, ORANGE, 1, said))
    if number == 0 or bars[number - 1].entering != bar.entering:
        drawn.append(
            _label(x + width / 2, HEIGHT - BOTTOM - bar.entering * scale - 4, bar.entering)
        )
    return drawn


def _rectangle(
    x: float, width: float, height: float, colour: str, opacity: float, said: str
) -> str:
    y = HEIGHT - BOTTOM - height
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colour}" fill-opacity="{opacity}"><title>{text(said)}</title></rect>'
    )


def _label(x: float, y: float, value: object) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text(value)}</text>'


def _legend(blocks: Sequence[Flow]) -> str:
    return (
        "; orange: computed anew in a frame" if any(b.updated is not None for b in blocks) else ""
    )
