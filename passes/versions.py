"""Which node is computed on which tokens.

A *version* of a value holds all patch tokens (0), those that stage ``s`` leaves (``s``), or none
(:attr:`Pruning.prefix_only`). Forwards: a node computes on the fewest tokens that its operands
have, if it treats tokens alone or is an attention; else on all. Backwards: a node is computed in
the versions that its users need. Where only fewer tokens are needed than it has, it is computed on
those straight away, so that a cut moves up through everything token-wise.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import fx

from tokenpass.blocks import Attention
from tokenpass.dims import Axis, Dims, axes_of
from tokenpass.facts import Effect, Facts, What, lined_up
from tokenpass.graph import acts, operands
from tokenpass.pruning import Pruning


@dataclass(frozen=True)
class Versions:
    """Decisions for every node.

    Attributes:
        level: The version that a node's operands have where it computes on the fewest tokens.
        computed: The versions in which a node is computed; others are made from these.
        reads: For a node in a version, the versions of its operands.
    """

    level: dict[fx.Node, int] = field(default_factory=dict)
    computed: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    reads: dict[tuple[fx.Node, int], tuple[int, ...]] = field(default_factory=dict)


class _Analysis:
    def __init__(self, facts: Facts, plan: Pruning, pinned: frozenset[fx.Node]) -> None:
        self.facts = facts
        self.plan = plan
        self.grid = plan.grid
        self.pinned = pinned
        self.cuts = {stage.at: stage.number for stage in plan.stages if stage.at is not None}
        self.stream = {residual.out for residual in plan.found.residuals}
        self.inside: dict[fx.Node, Attention] = {}
        for attention in plan.found.attentions:
            if self.grid.carried_by(attention.key_dim):
                self.inside |= {attention.softmax: attention, attention.out: attention}
        self.batch_axes = axes_of([plan.batch])
        self.level: dict[fx.Node, int] = {}
        self.wanted: dict[fx.Node, set[int]] = defaultdict(set)

    # ------------------------------------------------------------ forwards

    def run(self) -> Versions:
        for node in self.facts.graph.nodes:
            tokens = [self.after(o) for o in operands(node) if self.carries(o)]
            deepest = max(tokens, default=0)
            self.level[node] = deepest if deepest and self.per_token(node) else 0
        self._want_outputs()
        self._want_scores()
        found = Versions(self.level)
        for node in reversed(self.facts.graph.nodes):
            if node.op == "output" or not self.wanted[node]:
                continue
            found.computed[node] = tuple(sorted(self._computed_in(node, self.wanted[node])))
            for version in found.computed[node]:
                reads = tuple(self._reads(node, o, version) for o in operands(node))
                found.reads[node, version] = reads
                for operand, read in zip(operands(node), reads, strict=True):
                    self.wanted[operand].add(read)
        return found

    def carries(self, node: fx.Node) -> bool:
        return self.plan.carried_in(self.facts.effects[node].outs)

    def after(self, node: fx.Node) -> int:
        """The version that readers of ``node`` get where they need no other."""
        return self.cuts.get(node, self.level[node])

    def per_token(self, node: fx.Node) -> bool:
        """Whether ``node`` may be computed on some of the tokens only."""
        effect = self.facts.effects[node]
        if node in self.pinned or effect.what is What.OPAQUE:
            return False
        if any(self.grid.shredded_in(dims) for dims in effect.outs):
            return False
        if not all(self._lines_up(o, seen) for o, seen in self.facts.seen(node)):
            return False
        return not self._mixed(node, effect)

    def _lines_up(self, operand: fx.Node, seen: Dims) -> bool:
        """Whether the operand's tokens are the computation's tokens, in the same places."""
        own = self.facts.dims(operand) if len(self.facts.effects[operand].outs) == 1 else seen
        places = self.grid.carried_in(own)
        lined = lined_up(own, seen)
        return all(own[place] == lined[place] for place in places) and not (
            self.grid.shredded_in(own) or self.grid.shredded_in(seen)
        )

    def _mixed(self, node: fx.Node, effect: Effect) -> bool:
        """Whether tokens, or the sets of tokens of a batch, see each other in ``node``."""
        if effect.mixed & self.batch_axes:
            return True
        mixed = {axis for axis in effect.mixed if self.grid.touched_by(axis)}
        if node in self.inside:
            mixed -= axes_of([self.inside[node].key_dim])
        survivors = effect.what is What.AVERAGE and not self.plan.method.merges
        if survivors and not any(self.grid.carried_in(dims) for dims in effect.outs):
            mixed -= self._carrying_axes(node)
        return bool(mixed)

    def _carrying_axes(self, node: fx.Node) -> frozenset[Axis]:
        (source,) = operands(node)
        dims = self.facts.dims(source)
        return axes_of(dims[place] for place in self.grid.carried_in(dims))

    # ------------------------------------------------------------ backwards

    def _want_outputs(self) -> None:
        (output,) = self.facts.graph.find_nodes(op="output")
        final = len(self.plan.stages)
        after_merging = self.plan.method.merges and not self.plan.inside
        for node in output.all_input_nodes:
            whole = self.plan.method.restores or after_merging or not self.carries(node)
            self.wanted[node].add(0 if whole else final)
        for node in self.pinned:
            self.wanted[node].add(0)
        for node in self.facts.graph.nodes:
            if acts(node):
                for operand in operands(node):
                    self.wanted[operand].add(0)

    def _want_scores(self) -> None:
        for stage in self.plan.stages:
            self._want_attention(stage.attention)
            if stage.at is not None:
                self.wanted[stage.at].add(stage.number)
        self._want_attention(self.plan.anchors)

    def _want_attention(self, attention: Attention) -> None:
        level = self.level[attention.softmax]
        if not attention.plain:
            self.wanted[attention.softmax].add(level)
            return
        for node in (attention.query, attention.key):
            self.wanted[node].add(level)
        for mask in attention.masks:
            self.wanted[mask.node].add(level if self.carries(mask.node) else 0)

    def _computed_in(self, node: fx.Node, wanted: set[int]) -> set[int]:
        """The versions to compute so that the wanted ones can be had."""
        base = self.level[node]
        if not self.carries(node):
            return {base}
        cut = self.cuts.get(node)
        computed: set[int] = set()
        for version in wanted:
            if version == base or (cut is not None and cut <= version):
                computed.add(base)
            elif version < base:
                computed |= self._restored_from(node, base)
        fewer = [version for version in wanted if version > base and cut is None]
        if fewer and not computed:
            computed.add(min(fewer) if self._narrows(node) else base)
        elif fewer and base not in computed:
            computed.add(base)
        return computed or {base}

    def _restored_from(self, node: fx.Node, base: int) -> set[int]:
        """What the full version of ``node`` is made from, after tokens have left."""
        if self.plan.method.merges:
            return {base}
        if node in self.stream:
            last = self.plan.stages[base - 1].at
            assert last is not None
            self.wanted[last].add(0)
            return {base}
        return {base} if node in self.inside else {0}

    def _narrows(self, node: fx.Node) -> bool:
        """Whether ``node`` can be computed on fewer tokens than its operands have."""
        if not operands(node) or not self.per_token(node):
            return False
        if any(len(self.facts.effects[operand].outs) > 1 for operand in operands(node)):
            return False
        attention = self.inside.get(node)
        return attention is None or (attention.fused and not self._keys_are_masked(attention))

    def _keys_are_masked(self, attention: Attention) -> bool:
        """Whether a mask is computed from tokens of the keys, which are more than the queries."""
        last = [self.facts.dims(mask.node)[-1:] for mask in attention.masks]
        return any(self.grid.carried_in(dims) for dims in last)

    def _reads(self, node: fx.Node, operand: fx.Node, version: int) -> int:
        """The version of ``operand`` that ``node`` needs to be computed in ``version``."""
        if not self.carries(operand):
            return 0
        neutral = not self.carries(node)
        if neutral and self._reads_prefix(node):
            return self.plan.prefix_only
        if neutral or self._is_key_or_value(node, operand):
            return self.level[node]
        return version

    def _reads_prefix(self, node: fx.Node) -> bool:
        """Whether ``node`` takes tokens out of the sequence without touching a patch token.

        At full budget every token is computed all the same: nothing is left out then.
        """
        if all(stage.count == self.grid.count for stage in self.plan.stages):
            return False
        effect = self.facts.effects[node]
        axes = effect.mixed | axes_of(dim for dims in effect.outs for dim in dims)
        touched = any(self.grid.touched_by(axis) for axis in axes)
        return effect.what is What.VIEW and bool(effect.literals) and not touched

    def _is_key_or_value(self, node: fx.Node, operand: fx.Node) -> bool:
        attention = self.inside.get(node)
        if attention is None or not attention.fused:
            return False
        return operand in (attention.key, attention.value) and operand is not attention.query


def decide_versions(facts: Facts, plan: Pruning, pinned: frozenset[fx.Node]) -> Versions:
    """Decide for every node on which tokens it is computed.

    Args:
        facts: Of the graph.
        plan: The cuts.
        pinned: Nodes that share memory with something written in place: always all tokens.
    """
    return _Analysis(facts, plan, pinned).run()
