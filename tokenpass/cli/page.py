"""The report of ``tokenpass explain`` as a page, with a photograph and a slider if asked."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

import tokenpass
from tokenpass.cli.models import Loaded
from tokenpass.cli.pictures import Picture, grid_of, input_of, read, size_of, to_pixels
from tokenpass.cli.screen import InputError, say, whole_file, working
from tokenpass.methods import HiPrune, Method
from tokenpass.report import Report


def write_page(
    path: Path, loaded: Loaded, report: Report, method: Method, photo: Path | None
) -> None:
    """Write a report as one HTML file.

    Args:
        path: Of the file.
        loaded: What was explained.
        report: On it.
        method: What was asked for.
        photo: Shown with a slider over budgets: which of its tokens stay.

    Raises:
        InputError: If the photograph cannot be read or the model prunes no grid of patches.
    """
    title = f"tokenpass: {loaded.name}"
    if photo is None:
        page = tokenpass.html_report(report, title=title)
    elif not isinstance(method, HiPrune):
        raise InputError("--image shows which tokens pruning keeps: leave out --method")
    else:
        grid = grid_of(report, loaded.name)
        one = loaded.one_by_one()
        picture = read(photo, *size_of(one))
        look = partial(tokenpass.kept_by_budget, one.model, method=method)
        with working("looking at budgets"):
            kept = one.call(look, input_of(one, picture))
        page = tokenpass.html_report(
            report, title=title, image=_encoded(picture), kept=kept, grid=grid
        )
        if loaded.random:
            say("random weights: the tokens mean nothing")
    with whole_file(path) as file:
        file.write_text(page, encoding="utf-8")
    say(f"written: {path}")


def _encoded(picture: Picture) -> bytes:
    """A photograph ``(H, W, 3)``, 0 to 1, as the bytes of a JPEG file."""
    file = BytesIO()
    Image.fromarray(to_pixels(picture)).save(file, "JPEG", quality=90)
    return file.getvalue()
