"""``tokenpass image``: which tokens of a photograph stay, cut by cut and budget by budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

import tokenpass
from tokenpass import plot
from tokenpass.cli import choice
from tokenpass.cli.answers import agreement, answer_of
from tokenpass.cli.explain import planned
from tokenpass.cli.models import Loaded, load
from tokenpass.cli.pictures import Picture, grid_of, input_of, pictures_in, read, size_of
from tokenpass.cli.screen import InputError, print_json, results, say, track, whole_file, working
from tokenpass.cuts import Cut
from tokenpass.methods import HiPrune
from tokenpass.options import parse_options

DPI = 120


@dataclass(frozen=True)
class Seen:
    """What happened to a photograph at one budget.

    Attributes:
        cuts: In order.
        share: Of the FLOPs.
        agrees: How far the answer is that of all tokens, 0 to 1.
    """

    cuts: list[Cut]
    share: float
    agrees: float

    @property
    def kept(self) -> Tensor:
        return self.cuts[-1].kept[0]


def command(
    model: choice.Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Files or folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the pictures.")] = Path("."),
    keep: choice.Keep = None,
    keeps: Annotated[
        str, typer.Option(metavar="LIST", help="Budgets on the contact sheet.")
    ] = "0.7,0.5,0.36,0.25,0.15,0.1",
    input: choice.Input = None,
    set: choice.Set = None,
    weights: choice.Weights = "pretrained",
    as_json: choice.Json = False,
) -> int:
    """Draw kept and merged tokens on photographs, for each cut and for several budgets."""
    sheet = choice.numbers("--keeps", keeps)
    asked = choice.options(None, keep, set, inner="eager")
    options = {"always_rewrite": True, **asked, "record_cuts": True}
    settings = parse_options(options)
    if not isinstance(settings.method, HiPrune):
        raise InputError("image draws pruning: for gates there is `tokenpass video`")
    paths = pictures_in(images)
    with working(f"loading {model}"):
        loaded = load(model, input, weights).check().one_by_one()
    size = size_of(loaded)
    photos = [read(path, *size) for path in paths]
    with working("planning"):
        planned(loaded, settings.method)
    if loaded.random:
        say("random weights: the tokens mean nothing")
    fast = torch.compile(loaded.model, backend="tokenpass", options=options)
    with working("compiling"), torch.inference_mode():
        loaded.call(fast)
    grid = grid_of(tokenpass.report(fast), model)
    rows = []
    pairs = list(zip(names_of(paths), photos, strict=True))
    for name, photo in track(pairs, "pictures"):
        pixels = input_of(loaded, photo)
        with torch.inference_mode():
            seen = {k: look(loaded, fast, pixels, k) for k in (settings.method.keep, *sheet)}
        written = draw(out, name, photo, grid, seen)
        rows += [_row(name, k, found, grid) for k, found in seen.items()]
        rows[-len(seen)]["files"] = [str(path) for path in written]
    if as_json:
        print_json({"model": model, "grid": list(grid), "rows": rows})
    else:
        results().print(table_of(rows))
        count = sum(len(row.get("files", ())) for row in rows)
        say(f"written: {count} pictures in {out}")
    return 0


def names_of(paths: list[Path]) -> list[str]:
    """A name for the pictures of each file, no two alike."""
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names.append(name)
    return names


def look(loaded: Loaded, fast: Any, pixels: Tensor, keep: int | float) -> Seen:
    """Run a photograph ``(1, 3, H, W)`` at one budget, on a model that has run before."""
    tokenpass.set_budget(fast, keep=keep)
    answer = answer_of(loaded.call(fast, pixels))
    stats = tokenpass.stats(fast)
    agrees = agreement(answer, answer_of(loaded.call(loaded.model, pixels)))
    return Seen(tokenpass.cuts(fast), stats.flops / stats.flops_before, float(agrees.mean()))


def draw(
    out: Path, name: str, photo: Picture, grid: tuple[int, int], seen: dict[int | float, Seen]
) -> list[Path]:
    """Write the pictures of a photograph: what each cut left, what was merged, the contact sheet.

    Args:
        out: Folder.
        name: Beginning of the files' names.
        photo: ``(H, W, 3)``, 0 to 1.
        grid: Rows and columns of patches.
        seen: At each budget, the one that is shown cut by cut first.
    """
    keep, first = next(iter(seen.items()))
    cuts = [cut.kept[0] for cut in first.cuts]
    words = [f"cut {n}: {len(kept)} tokens" for n, kept in enumerate(cuts, 1)]
    figures = {"cuts": plot.tokens(photo, cuts, grid, words)}
    owner = first.cuts[-1].owner
    if owner is not None:
        title = f"keep {keep:g}: {math.prod(grid)} tokens merged into {len(first.kept)}"
        figures["merged"] = plot.merge_map(photo, owner[0], grid, title)
    budgets = sorted(seen, key=lambda k: len(seen[k].kept), reverse=True)
    words = [f"keep {k:g}, {seen[k].share:.2f} of the FLOPs" for k in budgets]
    figures["keeps"] = plot.tokens(photo, [seen[k].kept for k in budgets], grid, words)
    written = [out / f"{name}-{kind}.png" for kind in figures]
    for path, figure in zip(written, figures.values(), strict=True):
        with whole_file(path) as file:
            figure.savefig(file, dpi=DPI)
    return written


def _row(name: str, keep: int | float, seen: Seen, grid: tuple[int, int]) -> dict[str, Any]:
    return {
        "image": name,
        "keep": keep,
        "tokens": math.prod(grid),
        "kept": [cut.kept.shape[1] for cut in seen.cuts],
        "of_flops": seen.share,
        "agreement": seen.agrees,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    table = Table(box=None, pad_edge=False)
    for title in ("image", "keep", "tokens", "of the FLOPs", "answer like with all"):
        table.add_column(title, justify="left" if title in ("image", "tokens") else "right")
    previous = ""
    for row in rows:
        flow = " ".join(map(str, (row["tokens"], *row["kept"])))
        name, previous = (row["image"] if row["image"] != previous else ""), row["image"]
        agrees = f"{row['agreement']:.3f}"
        table.add_row(name, f"{row['keep']:g}", flow, f"{row['of_flops']:.2f}", agrees)
    return table
