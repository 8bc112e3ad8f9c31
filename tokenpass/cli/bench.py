"""``tokenpass bench``: what a model's budget does to its time, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import tokenpass
from tokenpass.cli import choice
from tokenpass.cli.explain import planned
from tokenpass.cli.models import Loaded, load
from tokenpass.cli.screen import InputError, print_json, results, track, working
from tokenpass.errors import described
from tokenpass.methods import Eventful
from tokenpass.options import Settings, parse_options
from tokenpass.timing import Times, interleaved

EAGER = "eager"
PLAIN = "compiled, all tokens"
WARM_UP = 2


def command(
    model: choice.Model,
    keeps: Annotated[str, typer.Option(metavar="LIST", help="Budgets to time.")] = "0.7,0.5,0.36",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is run.")] = 15,
    input: choice.Input = None,
    method: choice.MethodName = None,
    set: choice.Set = None,
    weights: choice.Weights = None,
    as_json: choice.Json = False,
) -> int:
    """Time a model in turns: eager, compiled, and compiled with tokenpass at some budgets.

    Behind gates (--method eventful) each call is a frame of noise, in which every token changes.
    """
    budgets = choice.numbers("--keeps", keeps)
    settings = parse_options({**choice.options(method, None, set), "keep": budgets[0]})
    with working(f"loading {model}"):
        loaded = load(model, input, weights).check()
    with working("planning"):
        planned(loaded, settings.method)
    with torch.inference_mode():
        rows = measured(loaded, settings, budgets, rounds)
    if as_json:
        print_json({"model": model, "threads": torch.get_num_threads(), "rows": rows})
    else:
        results().print(table_of(rows))
    return 0


def measured(
    loaded: Loaded, settings: Settings, budgets: list[int | float], rounds: int
) -> list[dict[str, Any]]:
    """A row for each variant.

    Raises:
        InputError: If the model does not compile.
    """
    torch._dynamo.reset()
    plain = torch.compile(loaded.model, backend=settings.inner)
    fast = torch.compile(
        loaded.model,
        backend=tokenpass.backend(
            settings.method, inner=settings.inner, always_rewrite=settings.always_rewrite
        ),
    )
    frames = _frames(loaded) if isinstance(settings.method, Eventful) else None

    def run_fast() -> Any:
        return loaded.call(fast, next(frames) if frames else None)

    def setting(keep: int | float) -> Callable[[], Any]:
        return lambda: tokenpass.set_budget(fast, keep=keep)

    calls = {EAGER: lambda: loaded.call(loaded.model), PLAIN: lambda: loaded.call(plain)}
    calls |= {_name(keep): run_fast for keep in budgets}
    settings_before = {_name(keep): setting(keep) for keep in budgets}
    shares = {EAGER: 1.0, PLAIN: 1.0}
    try:
        with working("compiling without tokenpass"):
            loaded.call(plain)
        with working("compiling with tokenpass"):
            run_fast()
        for keep in track(budgets, "compiling each budget"):
            tokenpass.set_budget(fast, keep=keep)
            run_fast()
            if isinstance(settings.method, Eventful):
                run_fast()
            stats = tokenpass.stats(fast)
            shares[_name(keep)] = stats.flops / stats.flops_before
    except Exception as error:
        raise InputError(f"{loaded.name} does not compile ({described(error)})") from error
    with working(f"timing {rounds} rounds"):
        times = interleaved(calls, rounds, WARM_UP, settings_before)
    return [_row(name, times[name], times[PLAIN], shares[name]) for name in calls]


def _name(keep: int | float) -> str:
    return f"tokenpass, keep {keep:g}"


def _frames(loaded: Loaded) -> Any:
    while True:
        yield torch.randn_like(loaded.images)


def _row(name: str, times: Times, baseline: Times, share: float) -> dict[str, Any]:
    return {
        "variant": name,
        "median_ms": 1e3 * times.median,
        "iqr_ms": 1e3 * times.spread,
        "of_compiled": times.ratio_to(baseline),
        "of_flops": share,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    table = Table(box=None, pad_edge=False)
    for title in ("", "ms", "spread", "of compiled", "of the FLOPs"):
        table.add_column(title, justify="right" if title else "left")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['median_ms']:.1f}",
            f"{row['iqr_ms']:.1f}",
            f"{row['of_compiled']:.2f}",
            f"{row['of_flops']:.2f}",
        )
    return table
