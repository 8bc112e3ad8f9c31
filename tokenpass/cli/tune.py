"""``tokenpass tune``: the smallest budget that loses no more than allowed on a user's own data."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from tokenpass import plot
from tokenpass.cli import choice
from tokenpass.cli.curve import Curve, batches_of, clips_in, frames_of, read_labels
from tokenpass.cli.explain import planned
from tokenpass.cli.models import load
from tokenpass.cli.pictures import pictures_in
from tokenpass.cli.screen import (
    NO,
    InputError,
    print_json,
    results,
    say,
    track,
    whole_file,
    working,
)
from tokenpass.config import Config, as_text
from tokenpass.methods import Eventful
from tokenpass.options import parse_options

FRAMES = 16
"""Frames of a clip that are run unless more are asked for."""
TIMED = 4
"""Batches that are timed in turns."""


def command(
    model: choice.Model,
    data: Annotated[Path, typer.Option(help="Folder of photographs, or of clips for gates.")],
    labels: Annotated[Path | None, typer.Option(help="CSV: file,label.")] = None,
    max_loss: Annotated[float, typer.Option(help="Points that may be lost.")] = 0.5,
    keeps: Annotated[
        str, typer.Option(metavar="LIST", help="Budgets to try.")
    ] = "0.8,0.65,0.5,0.36,0.27,0.2",
    limit: Annotated[int | None, typer.Option(min=2, help="Images, or frames a clip.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    seeds: Annotated[int, typer.Option(min=0, help="Random selections beside it.")] = 1,
    rounds: Annotated[int, typer.Option(min=0, help="Of timing; 0 times nothing.")] = 10,
    out: Annotated[Path, typer.Option("--out", "-o", help="The config.")] = Path("tokenpass.toml"),
    figure: Annotated[Path, typer.Option(help="The plot.")] = Path("tokenpass.png"),
    method: choice.MethodName = None,
    input: choice.Input = None,
    set: choice.Set = None,
    weights: choice.Weights = "pretrained",
    as_json: choice.Json = False,
) -> int:
    """Measure what budgets lose on your data, and write the cheapest one within --max-loss.

    Exit code 1: every budget loses more; nothing is written.
    """
    budgets = choice.numbers("--keeps", keeps)
    options = choice.options(method, None, set)
    settings = parse_options({**options, "keep": budgets[-1]})
    gated = isinstance(settings.method, Eventful)
    if not data.is_dir():
        raise InputError(f"there is no folder {data}")
    if gated and labels is not None:
        raise InputError("--labels are of photographs: leave it out for clips")
    paths = clips_in(data) if gated else pictures_in([data])[:limit]
    classes = None if labels is None else read_labels(labels, paths)
    with working(f"loading {model}"):
        loaded = load(model, input, weights).check()
    if gated:
        loaded = loaded.one_by_one()
    elif loaded.batch is not None:
        batch = loaded.batch
        paths = _whole_batches(paths, batch, model)
    with working("planning"):
        report = planned(loaded, settings.method)
    if not (report.converted or settings.always_rewrite or settings.method.full):
        reasons = "; ".join(dict.fromkeys(item.reason for item in report.refusals))
        raise InputError(f"{model} is left as it is: {reasons}")
    if loaded.random:
        say("random weights: the losses mean nothing")
    curve = Curve(loaded, settings, budgets, seeds)
    if gated:
        given, total = frames_of(loaded, paths, limit or FRAMES), len(paths) * (limit or FRAMES)
    else:
        given, total = batches_of(loaded, paths, classes, batch), -(-len(paths) // batch)
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        for item in track(given, "images", total):
            curve.add(item)
            if len(seen) < TIMED and (not seen or item.images.shape == seen[0].shape):
                seen.append(item.images)
        all_ms = None
        if rounds:
            with working("compiling and timing"):
                all_ms = curve.time(seen, rounds)
    rows = [row.summary(curve.baseline) for row in curve.rows]
    good = [row for row in rows if row["loss"] <= max_loss]
    chosen = min(good, key=lambda row: row["flops"])["keep"] if good else None
    about = {
        "model": model,
        "data": str(data),
        "images": len(curve.baseline),
        "scored": "agreement with all tokens" if classes is None else "right class",
        "all_tokens_ms": all_ms,
        "max_loss": max_loss,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    if chosen is not None:
        name = "eventful" if gated else "hiprune"
        config = Config({"method": name, **options, "keep": chosen}, rows, about)
        with whole_file(out) as file:
            file.write_text(as_text(config), encoding="utf-8")
        with whole_file(figure) as file:
            plot.pareto(rows, max_loss=max_loss, chosen=chosen).savefig(file)
    if as_json:
        print_json({**about, "chosen": chosen, "rows": rows})
    else:
        results().print(table_of(rows, chosen, classes is None))
        if chosen is not None:
            say(f"keep {chosen:g} is the cheapest within {max_loss:g} points: {out}, {figure}")
    if chosen is None:
        least = min(row["loss"] for row in rows)
        say(f"every budget loses more than {max_loss:g} points; the least is {least:g}")
        return NO
    return 0


def _whole_batches(paths: list[Path], batch: int, model: str) -> list[Path]:
    """The photographs that fill batches of a model that takes no other number."""
    left = len(paths) % batch
    if left == len(paths):
        raise InputError(f"{model} takes {batch} pictures at a time: there are {left}")
    if left:
        say(f"{model} takes {batch} pictures at a time: the last {left} are left out")
    return paths[: len(paths) - left]


def table_of(rows: list[dict[str, Any]], chosen: Any, agrees: bool) -> Table:
    """The rows for people."""
    table = Table(box=None, pad_edge=False)
    score = "agreement %" if agrees else "right %"
    titles = ("", "keep", score, "loss, points", "random's", "of the FLOPs", "ms an image")
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        random, ms = row["random_loss"], row["ms"]
        table.add_row(
            ">" if row["keep"] == chosen else "",
            f"{row['keep']:g}",
            f"{row['score']:.1f}",
            f"{row['loss']:.2f} ± {row['loss_error']:.2f}",
            "" if random is None else f"{random:.2f}",
            f"{row['flops']:.3f}",
            "" if ms is None else f"{ms:.1f}",
        )
    return table
