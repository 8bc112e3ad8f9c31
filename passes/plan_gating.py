"""From what a graph holds to what will be gated: regions, and attentions that can be updated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from torch import fx

from tokenpass import reasons
from tokenpass.blocks import Attention, Found, NoMatch
from tokenpass.dims import Dim
from tokenpass.facts import Facts, multiply_adds
from tokenpass.gates import FEWEST
from tokenpass.gating import GatedAttention, Gating, Region, gateable
from tokenpass.graph import tensor_of
from tokenpass.methods import Eventful
from tokenpass.passes.any_tokens import around_any_tokens
from tokenpass.passes.input_axes import varying_nodes
from tokenpass.passes.pooled_keys import pooled_cells
from tokenpass.rows import own_digits

PATTERN = "gating"


def plan_gating(
    facts: Facts,
    found: Found,
    constants: frozenset[fx.Node],
    method: Eventful,
    *,
    always: bool,
) -> Gating | NoMatch:
    """Decide the gates.

    Args:
        facts: Of the graph; all sizes are numbers.
        found: What the patterns found.
        constants: Placeholders that are parameters or buffers.
        method: What was asked for.
        always: Gate a region even if its gate costs more than it saves. One of so few tokens that
            how many pass would be a constant of the graph has no gate.
    """
    around = around_any_tokens(
        facts,
        found,
        constants,
        with_norms=method.gate_before_norm,
        cut_off=not found.attentions,
    )
    regions = [region for region in around.regions if region.layout.count > FEWEST]
    if method.compat:
        regions = [replace(region, fixed=()) for region in regions]
    unpaid: list[NoMatch] = []
    if not always:
        costs = [_costs_more(facts, region) for region in regions]
        regions = [region for region, cost in zip(regions, costs, strict=True) if cost is None]
        unpaid = [miss for miss in costs if isinstance(miss, NoMatch)]
    if not regions:
        attentions = tuple(match.softmax for match in found.attentions)
        return unpaid[0] if unpaid else NoMatch(PATTERN, reasons.NO_TOKEN_WISE, attentions)
    updated, misses = _attentions(facts, found.attentions, regions, constants, method)
    gated = {node for region in regions for node in region.nodes}
    return Gating(
        method=method,
        regions=regions,
        attentions=updated,
        blocks=[b for b in around.blocks if not gated.isdisjoint(gateable(b))],
        mlps=around.mlps,
        misses=[*misses, *unpaid, *around.misses],
    )


def _costs_more(facts: Facts, region: Region) -> NoMatch | None:
    """Why a gate would not pay: fewer multiply-adds than a gate has operations (section 4.1)."""
    saved = sum(multiply_adds(facts.effects[node].work) for node in region.nodes)
    moved = 3 * _elements(region.inputs) + _elements(region.outputs)
    if saved > moved:
        return None
    return NoMatch(PATTERN, reasons.gate_costs_more(int(saved), moved), tuple(region.nodes))


def _elements(nodes: Iterable[fx.Node]) -> int:
    return sum(int(tensor_of(node).numel()) for node in nodes)


# ---------------------------------------------------------------- attention


def _attentions(
    facts: Facts,
    attentions: Iterable[Attention],
    regions: list[Region],
    constants: frozenset[fx.Node],
    method: Eventful,
) -> tuple[list[GatedAttention], list[NoMatch]]:
    if method.attention == "none":
        return [], []
    varying = varying_nodes(facts, constants)
    updated: list[GatedAttention] = []
    misses: list[NoMatch] = []
    for match in attentions:
        found = _updated(facts, match, regions, varying, method.attention)
        if isinstance(found, GatedAttention):
            updated.append(found)
        else:
            misses.append(NoMatch(PATTERN, reasons.dense(found), (match.softmax,)))
    return updated, misses


def _updated(
    facts: Facts,
    match: Attention,
    regions: list[Region],
    varying: frozenset[fx.Node],
    mode: Literal["exact", "delta", "scores"],
) -> GatedAttention | str:
    """An attention as it can be updated, or why it cannot be."""
    reads = {match.query, match.key, match.value}
    poolable = mode != "exact" and match.plain and not match.masks
    for number, region in enumerate(regions):
        if reads <= set(region.outputs):
            reason = _why_dense(facts, match, region, varying, mode)
            return reason or GatedAttention(match, number, mode)
        if poolable and match.query in region.outputs and _of_all(match.query_dim, region):
            cells = pooled_cells(facts, match, region)
            if cells is not None:
                return GatedAttention(match, number, mode, cells)
    return reasons.SEVERAL_GATES


def _of_all(tokens: Dim, region: Region) -> bool:
    """Whether a dimension holds all tokens of an image, in one piece."""
    layout = region.layout
    return set(own_digits((tokens,), layout.axes) or ()) == set(layout.tokens)


def _why_dense(
    facts: Facts, match: Attention, region: Region, varying: frozenset[fx.Node], mode: str
) -> str:
    """Why an attention cannot be updated; empty if it can."""
    dims = [facts.dims(node) for node in (match.query, match.key, match.value)]
    within = all(match.key_dim in own for own in dims) and match.query_dim == match.key_dim
    if not within or not _of_all(match.key_dim, region):
        return reasons.OTHER_TOKENS
    if facts.dims(match.value)[-2:-1] != (match.key_dim,):
        return reasons.VALUES_LIE
    if mode == "delta":
        return ""
    if mode == "exact" and any(mask.node in varying for mask in match.masks):
        return reasons.VARYING_BIAS
    return "" if match.plain else reasons.NOT_PLAIN
