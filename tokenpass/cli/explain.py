"""``tokenpass explain``: look before compiling."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tokenpass
from tokenpass.cli import choice
from tokenpass.cli.models import Loaded, load
from tokenpass.cli.page import write_page
from tokenpass.cli.screen import NO, InputError, print_json, results, working
from tokenpass.errors import TokenpassError, described
from tokenpass.graph import short_place
from tokenpass.methods import Method
from tokenpass.options import parse_options
from tokenpass.report import Report


def command(
    model: choice.Model,
    input: choice.Input = None,
    method: choice.MethodName = None,
    keep: choice.Keep = None,
    target_flops: choice.TargetFlops = None,
    config: choice.ConfigFile = None,
    set: choice.Set = None,
    weights: choice.Weights = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page as well: one file.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="PHOTO", help="On the page: which of its tokens stay, by budget."),
    ] = None,
    as_json: choice.Json = False,
) -> int:
    """Show blocks, tokens, cost and refusals; nothing is compiled.

    Exit code 1: nothing would be converted.
    """
    given = choice.options(method, keep, set, target_flops=target_flops, config=config)
    settings = parse_options(given)
    if image is not None and html is None:
        raise InputError(f"--image {image}: pass --html FILE, the page to show it on")
    if settings.target_ms is not None:
        raise InputError("target_ms is found by timing: explain compiles nothing")
    wanted = settings.method
    with working(f"loading {model}"):
        loaded = load(model, input, weights).check()
    with working("planning"):
        if settings.target_flops is not None:
            solve = partial(
                tokenpass.budget_for,
                loaded.model,
                method=wanted,
                target_flops=settings.target_flops,
            )
            with torch.no_grad():
                wanted = loaded.call(solve)
        report = planned(loaded, wanted)
    if html is not None:
        write_page(html, loaded, report, wanted, image)
    if as_json:
        print_json({"model": model, "method": repr(wanted), **as_data(report)})
    else:
        console = results()
        console.print(report.text(console.width), soft_wrap=True)
    return 0 if report.converted else NO


def planned(loaded: Loaded, method: Method) -> Report:
    """What a method would do with a model.

    Raises:
        InputError: If the model has no attention, or cannot be traced.
    """

    def explained(*args: Any, **kwargs: Any) -> Report:
        return tokenpass.explain(loaded.model, *args, method=method, **kwargs)

    try:
        with torch.no_grad():
            report: Report = loaded.call(explained)
    except TokenpassError:
        raise
    except Exception as error:
        raise InputError(f"{loaded.name} cannot be traced ({described(error)})") from error
    if not report.attentions:
        raise InputError(f"{loaded.name} has no attention: there are no tokens to save")
    return report


def as_data(report: Report) -> dict[str, Any]:
    """A report as plain data."""
    rows = [row for graph in report.graphs for row in graph.blocks]
    return {
        "converted": report.converted,
        "graphs": len(report.graphs),
        "attentions": len(report.attentions),
        "mlps": len(report.mlps),
        "tokens": sum(graph.tokens for graph in report.graphs),
        "kept": sum(graph.kept for graph in report.graphs),
        "flops_before": report.flops_before,
        "flops": report.flops,
        "cost": str(report.cost),
        "blocks": [
            {
                "tokens_in": row.tokens_in,
                "tokens_out": row.tokens_out,
                "updated": row.updated,
                "from": short_place(row.block.place),
            }
            for row in rows
        ],
        "refusals": [
            {"reason": item.reason, "node": item.node, "from": short_place(item.place)}
            for item in report.refusals
        ],
    }
