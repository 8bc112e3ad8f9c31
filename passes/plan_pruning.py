"""From what was found to what will be cut: the schedule of HiPrune on one graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tokenpass import reasons
from tokenpass import torch_internals as internals
from tokenpass.blocks import Attention, Block, Found, NoMatch
from tokenpass.dims import Size
from tokenpass.errors import OptionError
from tokenpass.facts import Facts
from tokenpass.graph import expression
from tokenpass.grid import Grid
from tokenpass.layout import ToExtent, batch_factors
from tokenpass.methods import DEEP_DEPTH, OBJECT_DEPTH, Budget, HiPrune, cut_layers, layer_at
from tokenpass.passes.functionalise import written_values
from tokenpass.pruning import Pruning, Stage
from tokenpass.selection import token_budget
from tokenpass.views import Extent

PATTERN = "pruning"

Schedule = list[tuple[int, Budget]]


def plan_pruning(
    facts: Facts, found: Found, method: HiPrune, extent: ToExtent, hint: Callable[[Size], int]
) -> Pruning | NoMatch:
    """Decide the cuts.

    Args:
        facts: Of the graph.
        found: What the patterns found.
        method: What was asked for.
        extent: Turns a size into an integer of the running compilation.
        hint: Turns a size into the number it has for the inputs at hand.

    Raises:
        OptionError: If the method names a block that the model does not have.
    """
    if found.grid is None or not found.over_grid:
        any_attention = tuple(match.softmax for match in found.attentions)
        return NoMatch(PATTERN, reasons.NO_ATTENTION, any_attention)
    blocks = found.blocks
    if not blocks:
        nodes = tuple(match.out for match in found.over_grid)
        return NoMatch(PATTERN, reasons.NO_BLOCK, nodes)
    check_layers(method, len(blocks))
    if method.where == "output":
        return _output_pruning(facts, found, found.grid, method, extent)
    schedule = schedule_of(method, len(blocks), hint(found.grid.count))
    return _encoder_pruning(facts, found, found.grid, method, schedule, extent)


def check_layers(method: HiPrune, depth: int) -> None:
    """Raise :class:`OptionError` if ``method`` names a block that there is not."""
    named = {"object_layer": method.object_layer, "deep_layer": method.deep_layer}
    named |= {f"stages[{i}]": layer for i, (layer, _) in enumerate(method.stages or ())}
    for name, layer in named.items():
        if layer is not None and layer > depth:
            raise OptionError(f"{name}={layer}: the model has {depth} blocks over its patch tokens")


def schedule_of(method: HiPrune, depth: int, tokens: int) -> Schedule:
    """Blocks after which tokens leave, with the budget that each cut leaves.

    The default cuts leave equal shares of the tokens before them, so that the last one leaves
    ``keep``.
    """
    if method.stages is not None:
        return list(method.stages)
    first = method.object_layer or layer_at(depth, OBJECT_DEPTH)
    last = method.deep_layer or max(first, layer_at(depth, DEEP_DEPTH))
    if last < first:
        raise OptionError(f"deep_layer={last} lies before object_layer={first}")
    layers = cut_layers(first, last)
    share = method.keep if isinstance(method.keep, float) else min(1.0, method.keep / tokens)
    shares = [share ** ((index + 1) / len(layers)) for index in range(len(layers))]
    return list(zip(layers, [*shares[:-1], method.keep], strict=True))


def _encoder_pruning(
    facts: Facts,
    found: Found,
    grid: Grid,
    method: HiPrune,
    schedule: Schedule,
    extent: ToExtent,
) -> Pruning | NoMatch:
    blocks = found.blocks
    first = schedule[0][0]
    anchor_block = method.object_layer or first
    if anchor_block > first:
        raise OptionError(
            f"object_layer={anchor_block} lies behind the first cut, after block {first}"
        )
    tokens = extent(grid.count)
    stages: list[Stage] = []
    left: Extent = tokens
    for number, (layer, keep) in enumerate(schedule, 1):
        block = blocks[layer - 1]
        left = _fewer(token_budget(keep, tokens), left)
        stages.append(Stage(number, layer, block.attention, block.out, expression(left)))
    anchors = blocks[anchor_block - 1].attention
    cut = [blocks[layer - 1] for layer, _ in schedule]
    reason = _why_not(facts, found, grid, cut, anchors, method.ranking)
    if reason is not None:
        return reason
    at = stages[0].at
    assert at is not None
    batch = batch_factors(facts.dims(at), grid)
    return Pruning(method, found, grid, batch, anchors, anchor_block, tuple(stages))


def _output_pruning(
    facts: Facts, found: Found, grid: Grid, method: HiPrune, extent: ToExtent
) -> Pruning | NoMatch:
    blocks = found.blocks
    depth = len(blocks)
    anchor_block = method.object_layer or layer_at(depth, OBJECT_DEPTH)
    deep_block = method.deep_layer or depth
    anchors, deep = (blocks[layer - 1].attention for layer in (anchor_block, deep_block))
    deepest = [blocks[deep_block - 1]]
    reason = _why_not(facts, found, grid, deepest, anchors, method.ranking)
    if reason is not None:
        return reason
    batch = batch_factors(facts.dims(blocks[deep_block - 1].out), grid)
    tokens = extent(grid.count)
    keep = method.keep
    if method.compat == "llava" and isinstance(keep, int):
        images: Extent = 1
        for factor in batch:
            images = images * extent(factor.size)
        keep = max(1, keep // images)
    count = expression(token_budget(keep, tokens))
    stage = Stage(1, deep_block, deep, None, count)
    return Pruning(method, found, grid, batch, anchors, anchor_block, (stage,))


def _fewer(count: Extent, left: Extent) -> Extent:
    if isinstance(count, int) and isinstance(left, int):
        return min(count, left)
    return internals.smaller(count, left)


def _second_thought(facts: Facts, grid: Grid, attention: Attention) -> fx.Node | None:
    """A node between softmax and values in which patch tokens see one another, if there is one."""
    pending = [] if attention.fused else list(attention.softmax.users)
    visited = {attention.out}
    while pending:
        node = pending.pop()
        if node in visited or node.op == "output":
            continue
        visited.add(node)
        if any(grid.touched_by(axis) for axis in facts.effects[node].mixed):
            return node
        if any(grid.carried_in(dims) for dims in facts.effects[node].outs):
            pending += node.users
    return None


def _why_not(
    facts: Facts,
    found: Found,
    grid: Grid,
    blocks: list[Block],
    anchors: Attention,
    ranking: str,
) -> NoMatch | None:
    """Why tokens cannot be scored or cut at these places, if they cannot."""
    batch = None
    for block in blocks:
        dims = facts.dims(block.out)
        if len(grid.carried_in(dims)) != 1 or grid.shredded_in(dims):
            return NoMatch(PATTERN, reasons.NO_STREAM, (block.out,))
        factors = batch_factors(dims, grid)
        if batch is not None and set(batch) != set(factors):
            return NoMatch(PATTERN, reasons.OTHER_BATCH, (block.out,))
        batch = factors
    if ranking == "class" and grid.layout(grid.token_unit(anchors.key_dim))[0] is None:
        return NoMatch(PATTERN, reasons.NO_CLASS_TOKEN, (anchors.softmax,))
    written = written_values(facts.graph)
    for residual in found.residuals:
        if residual.out in written:
            return NoMatch(PATTERN, reasons.WRITTEN, (residual.out,))
    for attention in found.attentions:
        node = _second_thought(facts, grid, attention)
        if node is not None:
            return NoMatch(PATTERN, reasons.MIXED_MAPS, (node,))
    for attention in (anchors, *(block.attention for block in blocks)):
        for node in (attention.query, attention.key):
            dims = facts.dims(node)
            if len(grid.carried_in(dims)) != 1 or set(batch_factors(dims, grid)) != set(
                batch or ()
            ):
                return NoMatch(PATTERN, reasons.OTHER_QUERIES, (node,))
    return None
