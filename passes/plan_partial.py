"""Where pruning may cut token-wise parts while attention stays on all tokens.

For each set of tokens that regions run over (the grid of each stage of a hierarchical encoder, say)
there is one plan; the one that saves most is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
from torch import fx

from tokenpass import reasons
from tokenpass.blocks import Block, NoMatch
from tokenpass.dims import Size, axes_of, concat_axis
from tokenpass.errors import OptionError
from tokenpass.facts import Facts, multiply_adds
from tokenpass.gating import Region
from tokenpass.graph import ancestors, depends, tensor_of
from tokenpass.grid import image_part, is_packed
from tokenpass.methods import HiPrune
from tokenpass.partial import Cut, PartialPruning
from tokenpass.passes.any_tokens import Surroundings
from tokenpass.passes.cost import token_symbol
from tokenpass.passes.functionalise import written_values
from tokenpass.passes.gate_cost import row_work
from tokenpass.passes.input_axes import first_axes
from tokenpass.passes.plan_pruning import PATTERN, check_layers, schedule_of
from tokenpass.patterns.residual import SUMS
from tokenpass.rows import RowLayout
from tokenpass.selection import token_budget

BATCHED = 3
"""Dimensions from which on the first one is a batch; packed tokens are ``(N, C)``."""


def plan_partial(
    facts: Facts, around: Surroundings, method: HiPrune, *, piece: bool = False
) -> list[PartialPruning] | NoMatch:
    """One plan for each set of tokens that allows any.

    Args:
        facts: Of the graph; all sizes are numbers.
        around: What the patterns found around tokens of any kind.
        method: What was asked for.
        piece: Whether the graph is a piece of a model, tokens coming from another.
    """
    reason = _not_asked_for(method)
    attentions = tuple(match.softmax for block in around.blocks for match in block.attentions)
    if reason:
        return NoMatch(PATTERN, reason, attentions)
    groups: dict[tuple[object, object], list[Region]] = {}
    for region in around.regions:
        key = (frozenset(region.layout.batch), frozenset(region.layout.tokens))
        groups.setdefault(key, []).append(region)
    largest_first = sorted(groups.values(), key=len, reverse=True)
    context = _Context(
        facts,
        method,
        piece,
        {node: place for place, node in enumerate(facts.graph.nodes)},
        ancestors(facts.graph),
        written_values(facts.graph),
    )
    plans = [_Planner(context, group, around.blocks).plan() for group in largest_first]
    made = [plan for plan in plans if isinstance(plan, PartialPruning)]
    if made or not plans:
        return made or NoMatch(PATTERN, reasons.NO_PATCH_WISE, attentions)
    return next(plan for plan in plans if isinstance(plan, NoMatch))


def _not_asked_for(method: HiPrune) -> str:
    """What a method asks for that needs every attention without the tokens that left."""
    if method.where == "output":
        return reasons.PARTLY_OUTPUT
    if not method.restores:
        return reasons.PARTLY_PRUNED
    if method.ranking == "class":
        return reasons.PARTLY_CLASS
    return ""


@dataclass(frozen=True)
class _Context:
    """What all plans of a graph share.

    Attributes:
        facts: Of the graph.
        method: What was asked for.
        piece: Whether the graph is a piece of a model.
        order: Places of the nodes.
        sets: From :func:`ancestors`.
        written: What the graph writes into.
    """

    facts: Facts
    method: HiPrune
    piece: bool
    order: Mapping[fx.Node, int]
    sets: Mapping[fx.Node, int]
    written: frozenset[fx.Node]


class _Planner:
    """Plans the cuts of one set of tokens."""

    def __init__(
        self, context: _Context, regions: Sequence[Region], blocks: Sequence[Block]
    ) -> None:
        self.context = context
        self.facts = context.facts
        self.method = context.method
        self.regions = regions
        self.layout = regions[0].layout
        self.fixed = regions[0].fixed
        first: dict[fx.Node, Block] = {}
        for block in blocks:
            at = self._cut_of(block)
            if at is not None:
                first.setdefault(at, block)
        self.blocks, self.places = list(first.values()), list(first)
        one_for_all = context.piece and len(self.blocks) == 1
        cut_off = not all(block.attentions for block in self.blocks)
        self.apart = one_for_all or cut_off or is_packed(self.layout.tokens)

    def _cut_of(self, block: Block) -> fx.Node | None:
        """Where tokens may leave in a block: at its first addition, if that has these tokens.

        Without any it is what the next region reads of the attention; without attention it is what
        the MLP is computed from.
        """
        if not block.attentions:
            at = block.residuals[0].root
            return at if self._carries(at) else None
        if block.residuals:
            at = block.residuals[0].out
            return at if self._carries(at) else None
        inside = {node for region in self.regions for node in region.nodes}
        reads = (node for region in self.regions for node in region.inputs)
        behind = (n for n in reads if depends(self.context.sets, n, block.out) and n not in inside)
        return next((node for node in behind if self._carries(node)), None)

    def _carries(self, node: fx.Node) -> bool:
        outs = self.facts.effects[node].outs
        return len(outs) == 1 and self.layout.carried_by(outs[0])

    def plan(self) -> PartialPruning | NoMatch:
        shape = _grid_shape(self.layout, len(self.fixed))
        first = self.regions[0].outputs[0]
        if isinstance(shape, str):
            return NoMatch(PATTERN, shape, (first,))
        if first_axes(self.facts, BATCHED) & axes_of([self.layout.tokens]):
            return NoMatch(PATTERN, reasons.IMAGES_AS_TOKENS, (first,))
        if not self.blocks:
            return NoMatch(PATTERN, reasons.NO_BLOCK_HERE, (first,))
        patches = self.layout.count - len(self.fixed)
        try:
            check_layers(self.method, len(self.blocks))
        except OptionError as error:
            return NoMatch(PATTERN, str(error), (first,))
        cuts: list[Cut] = []
        left = patches
        for layer, keep in schedule_of(self.method, len(self.blocks), patches):
            left = min(left, token_budget(keep, patches))
            at = self.places[layer - 1]
            cuts.append(Cut(len(cuts) + 1, layer, at, left))
        stream = [*(cut.at for cut in cuts), *(block.out for block in self.blocks)]
        pinned = [node for node in stream if node in self.context.written]
        if pinned:
            return NoMatch(PATTERN, reasons.WRITTEN, tuple(pinned))
        chosen = self._behind(cuts)
        if not chosen:
            return NoMatch(PATTERN, reasons.NOTHING_BEHIND, (cuts[0].at,))
        return PartialPruning(
            self.method, self.layout, self.fixed, shape, cuts, chosen, self.blocks, self.apart
        )

    def _behind(self, cuts: Sequence[Cut]) -> list[tuple[Region, int]]:
        """The regions behind a cut, each with the number of the last cut before it."""
        chosen: list[tuple[Region, int]] = []
        for region in self.regions:
            merged = self.method.merges and not self.apart
            if not (merged or self._is_branch(region)):
                continue
            start = min(self.context.order[node] for node in region.nodes)
            before = [
                cut.number
                for cut in cuts
                if self.context.order[cut.at] < start
                and all(depends(self.context.sets, node, cut.at) for node in region.outputs)
            ]
            if before:
                same_order = replace(region, layout=self.layout)
                chosen.append((same_order, max(before)))
        return chosen

    def _is_branch(self, region: Region) -> bool:
        """Whether all that a region computes is added to the stream.

        A token that was discarded keeps its value then; what else reads it would see nothing.
        """
        added = {
            (item.branch, item.out)
            for block in self.blocks
            for item in block.residuals
            if item.out.target in SUMS
        }
        return all((node, user) in added for node in region.outputs for user in node.users)


def _grid_shape(layout: RowLayout, fixed: int) -> tuple[int, ...] | str:
    """Patch tokens along each axis, or why they are no grid; packed ones are a line."""
    if is_packed(layout.tokens):
        return 1, layout.count - fixed
    patches = image_part(layout.tokens)
    if isinstance(patches, str):
        return patches
    if concat_axis(layout.tokens) is None and concat_axis(patches) is not None:
        return reasons.NOT_ONE_PIECE
    sizes = tuple(int(factor.size) for factor in patches)
    return sizes if len(sizes) in (2, 3) else (1, math.prod(sizes))


def partial_cost(facts: Facts, plan: PartialPruning) -> Size:
    """FLOPs with the cuts of ``plan``, in ``n0``, ``n1``, ..."""
    images, fixed = plan.layout.images, len(plan.fixed)
    total: Size = sympy.Add(*(multiply_adds(effect.work) for effect in facts.effects.values()))
    for region, number in plan.regions:
        each = row_work(facts, region) * images
        total += each * (token_symbol(number) - token_symbol(0))
    if plan.method.merges:
        for cut in plan.cuts:
            before, after = token_symbol(cut.number - 1), token_symbol(cut.number)
            features = int(tensor_of(cut.at).numel()) // (plan.patches + fixed)
            total += (before - after) * after * features
    return sympy.expand(2 * total)


def partial_flops(facts: Facts, plan: PartialPruning) -> int:
    """The same as a number."""
    counts = {token_symbol(number): plan.count(number) for number in range(len(plan.cuts) + 1)}
    return int(partial_cost(facts, plan).subs(counts))
