"""Budgets in the user's terms: from a share of the FLOPs, or from milliseconds, to ``keep``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
from torch import fx

from tokenpass.dims import Size
from tokenpass.errors import OptionError
from tokenpass.gated import gate_planner
from tokenpass.methods import Eventful, HiPrune, Method
from tokenpass.passes.cost import token_symbol
from tokenpass.passes.plan_pruning import schedule_of
from tokenpass.pipeline import rewrite
from tokenpass.report import GraphReport
from tokenpass.selection import token_budget

PROBE = 0.05
"""The budget at which it is seen what pruning would do: so small that it pays, if it ever does."""

BAND = 0.1
"""A time between the target and this share below it is good."""
LEAST = 0.1
"""The smallest budget that is tried for a time."""
TRIES = 4
"""Budgets that are compiled and timed between the smallest and the full one, at most."""


def for_flops(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    method: Method,
    share: float,
    hint: Callable[[Size], int],
) -> Method:
    """``method`` with the largest budget at which a graph costs no more than a share of its FLOPs.

    A graph that the method leaves as it is keeps the method as it is.

    Args:
        module: Dynamo's graph.
        inputs: Its example inputs.
        method: What was asked for; its budget does not matter.
        share: In (0, 1].
        hint: Values of the symbols in the graph's sizes, for the inputs at hand.

    Raises:
        OptionError: If the smallest budget costs more.
    """
    if share == 1.0:
        return _with_keep(method, 1.0)
    if isinstance(method, Eventful):
        return _gates_for_flops(module, inputs, method, share)
    if method.where == "output":
        raise OptionError(
            f'target_flops={share} contradicts where="output": an encoder that runs in full costs '
            "what it costs"
        )
    probe = method.with_budget(PROBE)
    report = rewrite(module, inputs, probe, always=True, dry=True).report
    if not report.converted:
        return method
    cost = flops_of_tokens(report, method, hint)
    return _largest(method, report, share, cost)


def flops_of_tokens(
    report: GraphReport, method: HiPrune, hint: Callable[[Size], int]
) -> Callable[[int], int]:
    """FLOPs of a pruned graph as a function of the number of patch tokens that stay.

    Args:
        report: Of the graph at any budget, pruned.
        method: What was asked for.
        hint: Values of the symbols other than token counts.
    """
    depth, tokens = len(report.blocks), report.tokens
    layers = len(schedule_of(method.with_budget(PROBE), depth, tokens))
    symbols = [token_symbol(version) for version in range(layers + 1)]
    others = {s: hint(s) for s in report.cost.free_symbols - set(symbols)}
    polynomial = sympy.lambdify(symbols, report.cost.subs(others), "math")

    def flops(count: int) -> int:
        counts = [tokens]
        for _, keep in schedule_of(method.with_budget(count / tokens), depth, tokens):
            counts.append(min(counts[-1], token_budget(keep, tokens)))
        return int(polynomial(*counts))

    return flops


def _largest(
    method: HiPrune, report: GraphReport, share: float, flops: Callable[[int], int]
) -> HiPrune:
    """The largest number of tokens within the share; cost need not rise with it."""
    target, tokens = share * report.flops_before, report.tokens
    found = next((count for count in range(tokens, 0, -1) if flops(count) <= target), None)
    if found is None:
        least = min(map(flops, range(1, tokens + 1))) / report.flops_before
        raise OptionError(_unreachable(share, least))
    return method.with_budget(found / tokens)


def _gates_for_flops(
    module: fx.GraphModule, inputs: Sequence[Any], method: Eventful, share: float
) -> Eventful:
    """The largest budget of gates within the share, by bisection: cost rises with it."""
    planner = gate_planner(module, inputs)

    def planned(keep: float) -> GraphReport:
        return planner(replace(method, keep=keep, threshold=None))

    report = planned(PROBE)
    if not report.converted or not report.tokens:
        return method
    tokens, before = report.tokens, report.flops_before

    def good(count: int) -> bool:
        return planned(count / tokens).flops <= share * before

    if not good(1):
        raise OptionError(_unreachable(share, planned(1 / tokens).flops / before))
    low, high = 1, tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return replace(method, keep=low / tokens)


def _unreachable(share: float, least: float) -> str:
    return (
        f"target_flops={share:g} is out of reach: with a single token the model still costs "
        f"{least:.3f} of its FLOPs"
    )


def _with_keep(method: Method, keep: float) -> Method:
    if isinstance(method, Eventful):
        return replace(method, keep=keep)
    return method.with_budget(keep)


def for_milliseconds(
    target: float, measure: Callable[[float], float], least: float = LEAST
) -> float:
    """The largest ``keep`` found whose time is at most ``target``.

    Between the smallest and the full budget time is taken to be a line over ``keep``; the guess is
    timed, and narrows the line, until it comes close to the target from below.

    Args:
        target: Milliseconds.
        measure: Milliseconds that a call takes at a ``keep``.
        least: The smallest ``keep`` that is tried.

    Raises:
        OptionError: If the smallest budget takes longer.
    """
    slowest = measure(1.0)
    if slowest <= target:
        return 1.0
    fastest = measure(least)
    if fastest > target:
        raise OptionError(
            f"target_ms={target:g} is out of reach: {slowest:.1f} ms with all tokens, "
            f"{fastest:.1f} ms at keep={least:g}"
        )
    low, high = (least, fastest), (1.0, slowest)
    for _ in range(TRIES):
        if low[1] >= (1 - BAND) * target:
            break
        slope = (high[0] - low[0]) / max(high[1] - low[1], 1e-9)
        aim = (1 - BAND / 2) * target
        keep = min(max(low[0] + slope * (aim - low[1]), low[0]), high[0])
        if keep in (low[0], high[0]):
            break
        time = measure(keep)
        low, high = ((keep, time), high) if time <= target else (low, (keep, time))
    return low[0]
