"""A report as one HTML file that needs nothing from outside."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

import torch

from tokenpass import markup
from tokenpass.api import kept, set_budget, stats
from tokenpass.backend import backend
from tokenpass.errors import OptionError
from tokenpass.explain import fresh_call
from tokenpass.methods import HiPrune
from tokenpass.report import Report

KEEPS = tuple(tenth / 10 for tenth in range(1, 11))
"""Budgets of the slider unless others are asked for."""

TEMPLATE = "report_page.html"

PICTURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
"""How the files begin that every browser shows."""


@dataclass(frozen=True)
class KeptTokens:
    """What a budget leaves of one image.

    Attributes:
        keep: Share of the patch tokens.
        positions: Of the tokens that stay, on the grid, ascending.
        flops: Of the call, as a share of those of the original model.
    """

    keep: float
    positions: tuple[int, ...]
    flops: float


def kept_by_budget(
    model: Callable[..., Any],
    *args: Any,
    method: HiPrune | None = None,
    keeps: Sequence[float] = KEEPS,
    **kwargs: Any,
) -> list[KeptTokens]:
    """Which patch tokens of the first image stay at each of some budgets.

    The model runs once for each budget, in eager mode.

    Args:
        model: A module or a function.
        *args: Its inputs.
        method: How tokens are chosen; its budget is replaced. Default ``HiPrune()``.
        keeps: Shares of the patch tokens, in (0, 1].
        **kwargs: More inputs.

    Raises:
        OptionError: If the method is not pruning, or cannot take a budget.
        NothingRecordedError: If the model has no patch tokens.
    """
    wanted = HiPrune() if method is None else method
    if not isinstance(wanted, HiPrune):
        raise OptionError(f"method={wanted!r}: only pruning keeps some tokens; pass HiPrune(...)")
    first = backend(wanted.with_budget(keeps[0]), inner="eager", always_rewrite=True)
    compiled = torch.compile(fresh_call(), backend=first, dynamic=False)
    found: list[KeptTokens] = []
    with torch.no_grad():
        for keep in keeps:
            if found:
                set_budget(compiled, keep=keep)
            compiled(model, args, kwargs)
            cost = stats(compiled)
            share = cost.flops / cost.flops_before if cost.flops_before else 1.0
            found.append(KeptTokens(keep, tuple(kept(compiled)[0].tolist()), share))
    return found


def html_report(
    report: Report,
    *,
    title: str = "tokenpass report",
    image: bytes | None = None,
    kept: Sequence[KeptTokens] = (),
    grid: Sequence[int] = (),
) -> str:
    """A report as an HTML page: blocks, tokens through the depth, refusals.

    With a picture, a slider over the budgets shows on it which tokens stay.

    Args:
        report: From :func:`tokenpass.explain` or :func:`tokenpass.report`.
        title: Of the page.
        image: A PNG, JPEG, GIF or WebP file of what the model sees, cropped as it is.
        kept: From :func:`kept_by_budget`; needed with an image.
        grid: Rows and columns of patch tokens; needed with an image.

    Returns:
        The page. It holds all that it shows; its own policy forbids the browser any request.

    Raises:
        OptionError: If the image is of another kind, or comes without tokens or grid.
    """
    slider = "" if image is None else _slider(image, kept, grid)
    template = resources.files("tokenpass").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return Template(template).substitute(
        title=markup.text(title), slider=slider, report=report._repr_html_()
    )


def _slider(image: bytes, kept: Sequence[KeptTokens], grid: Sequence[int]) -> str:
    kind = next((name for start, name in PICTURES.items() if image.startswith(start)), None)
    if kind is None:
        raise OptionError("image: expected the bytes of a PNG, JPEG, GIF or WebP file")
    if not kept or len(grid) != 2:
        raise OptionError("image: pass kept=kept_by_budget(...) and grid=(rows, columns) with it")
    rows, columns = grid
    if any(choice.positions[-1] >= rows * columns for choice in kept if choice.positions):
        raise OptionError(f"grid={tuple(grid)} has fewer tokens than were kept")
    ordered = sorted(kept, key=lambda choice: choice.keep)
    data = {
        "rows": rows,
        "columns": columns,
        "choices": [vars(choice) for choice in ordered],
    }
    encoded = base64.b64encode(image).decode("ascii")
    middle = len(ordered) // 2
    return (
        '<section id="tokens"><h2>Which tokens stay</h2>'
        f'<label>keep <input id="keep" type="range" min="0" max="{len(ordered) - 1}" step="1" '
        f'value="{middle}"></label> <output id="said" for="keep"></output>'
        f'<div class="picture"><img alt="what the model sees" src="data:image/{kind};base64,'
        f'{encoded}"><svg id="dropped" preserveAspectRatio="none" '
        f'viewBox="0 0 {columns} {rows}"></svg></div>'
        f'<script id="data" type="application/json">{_json(data)}</script></section>'
    )


def _json(data: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
