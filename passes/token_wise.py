"""Find the regions of a graph that treat every token alone, and so may run on some of them.

A region is a connected set of operations around linear layers. It ends where tokens see one
another, where a branch is added to the residual stream, and where the set of tokens changes
(padding, a roll, pooling). It begins with its first linear layers, or with what stands before them
(a norm) if changes are to be measured there. Two parts that read the same values are one region:
queries, keys and values have one gate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import product

from torch import fx

from tokenpass.dims import Axis, Dims, Factor, axes_of, parts_of, size_of
from tokenpass.facts import Facts, What, lined_up
from tokenpass.gating import Region
from tokenpass.graph import operands
from tokenpass.grid import grids_in, is_packed
from tokenpass.passes.input_axes import varying_nodes
from tokenpass.rows import RowLayout, own_digits

ALONE = (What.VIEW, What.POINTWISE, What.NORM, What.CONTRACT, What.REDUCE, What.AVERAGE)

Key = tuple[frozenset[Factor], frozenset[Factor], int]
"""Batch, token set, and how many times the way to a node has left token-wise regions."""


def find_regions(
    facts: Facts,
    images: frozenset[Axis],
    channels: frozenset[Axis],
    stream: frozenset[fx.Node],
    excluded: frozenset[fx.Node],
    constants: frozenset[fx.Node],
    *,
    with_norms: bool,
) -> list[Region]:
    """All regions with a linear layer, in execution order.

    Args:
        facts: Of the graph.
        images: The axes of the batch.
        channels: Input axes that tell no tokens apart.
        stream: Residual additions: no region reaches across one.
        excluded: Nodes that no region may hold (what is written in place).
        constants: Placeholders that are parameters or buffers.
        with_norms: Whether a region begins before its first linear layer.
    """
    return _Finder(facts, images, channels, stream | excluded, constants, with_norms).regions()


class _Finder:
    def __init__(
        self,
        facts: Facts,
        images: frozenset[Axis],
        channels: frozenset[Axis],
        outside: frozenset[fx.Node],
        constants: frozenset[fx.Node],
        with_norms: bool,
    ) -> None:
        self.facts = facts
        self.images = images
        self.channels = channels
        self.outside = outside
        self.with_norms = with_norms
        self.varying = varying_nodes(facts, constants)
        self.order = {node: place for place, node in enumerate(facts.graph.nodes)}

    def regions(self) -> list[Region]:
        keys = self._keys()
        heavy = self._behind_linears(keys)
        members = {n: k for n, k in keys.items() if self.with_norms or n in heavy}
        parts = self._merged(self._connected(members), members)
        found = [
            self._region(part)
            for part in parts
            if not heavy.isdisjoint(part) and self._outputs(part)
        ]
        return sorted(found, key=lambda region: self.order[region.outputs[0]])

    # ------------------------------------------------------------ which nodes

    def _keys(self) -> dict[fx.Node, Key]:
        """The nodes that treat every token alone, and what tells their regions apart."""
        keys: dict[fx.Node, Key] = {}
        left: dict[fx.Node, int] = defaultdict(int)
        for node in self.facts.graph.nodes:
            sources = operands(node)
            depth = max((left[source] for source in sources), default=0)
            layout = self._layout(node)
            if layout is None or node in self.outside or not self._alone(node, layout):
                left[node] = depth
                continue
            crossed = [left[s] + (s not in keys) for s in sources if s in self.varying]
            left[node] = max(crossed, default=0)
            keys[node] = (frozenset(layout.batch), frozenset(layout.tokens), left[node])
        return keys

    def _layout(self, node: fx.Node) -> RowLayout | None:
        """How the one tensor that ``node`` computes carries tokens, if it does."""
        outs = self.facts.effects[node].outs
        if len(outs) != 1 or node not in self.varying or node.op != "call_function":
            return None
        return self._carrying(outs[0])

    def _carrying(self, dims: Dims) -> RowLayout | None:
        held = {factor.axis for dim in dims for factor in dim if factor.axis.data} - self.channels
        batch = own_digits(dims, held & self.images)
        tokens = own_digits(dims, held - self.images)
        return RowLayout(batch, tokens) if batch is not None and tokens else None

    def _alone(self, node: fx.Node, layout: RowLayout) -> bool:
        effect = self.facts.effects[node]
        if effect.what not in ALONE or effect.mixed & layout.axes:
            return False
        seen = list(self.facts.seen(node))
        tables = [dims for source, dims in seen if source not in self.varying]
        if effect.what is What.CONTRACT and axes_of(d for ds in tables for d in ds) & layout.axes:
            return False
        values = [source for source, _ in seen if source in self.varying]
        return bool(values) and all(
            self._is_value(source, dims, layout) for source, dims in seen if source in self.varying
        )

    def _is_value(self, source: fx.Node, seen: Dims, layout: RowLayout) -> bool:
        """Whether an operand has a value for each token, which is the token of the computation."""
        outs = self.facts.effects[source].outs
        if len(outs) != 1 or not layout.carried_by(outs[0]):
            return False
        other = self._carrying(outs[0])
        if other is None or other.axes != layout.axes:
            return False
        own = outs[0]
        return all(
            dim == line
            for dim, line in zip(own, lined_up(own, seen), strict=True)
            if any(factor.axis in layout.axes for factor in (*dim, *line))
        )

    def _is_linear(self, node: fx.Node) -> bool:
        effect = self.facts.effects[node]
        varying = [source for source in operands(node) if source in self.varying]
        return effect.what is What.CONTRACT and len(varying) == 1

    def _behind_linears(self, keys: dict[fx.Node, Key]) -> set[fx.Node]:
        """Linear layers, and what follows one in its region."""
        found: set[fx.Node] = set()
        for node, key in keys.items():
            before = (s for s in operands(node) if keys.get(s) == key)
            if self._is_linear(node) or any(source in found for source in before):
                found.add(node)
        return found

    # ------------------------------------------------------------ which regions

    def _connected(self, members: dict[fx.Node, Key]) -> list[list[fx.Node]]:
        part: dict[fx.Node, list[fx.Node]] = {}
        for node, key in members.items():
            part[node] = [node]
            for source in operands(node):
                if members.get(source) == key and part[source] is not part[node]:
                    joined = part[source] + part[node]
                    part |= dict.fromkeys(joined, joined)
        unique = {id(nodes): nodes for nodes in part.values()}
        return list(unique.values())

    def _merged(
        self, parts: Iterable[list[fx.Node]], members: dict[fx.Node, Key]
    ) -> list[list[fx.Node]]:
        """Parts that read the same values, as one."""
        groups: dict[object, list[fx.Node]] = defaultdict(list)
        for part in parts:
            groups[members[part[0]], frozenset(self._inputs(part))] += part
        return [sorted(nodes, key=self.order.__getitem__) for nodes in groups.values()]

    def _inputs(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        inside = set(nodes)
        read = (s for node in nodes for s in operands(node))
        return list(dict.fromkeys(s for s in read if s not in inside and s in self.varying))

    def _region(self, nodes: list[fx.Node]) -> Region:
        inputs = self._inputs(nodes)
        layout = self._carrying(self.facts.dims(inputs[0]))
        assert layout is not None
        outputs = tuple(self._outputs(nodes))
        return Region(layout, tuple(nodes), tuple(inputs), outputs, _prefix(layout))

    @staticmethod
    def _outputs(nodes: Iterable[fx.Node]) -> list[fx.Node]:
        inside = set(nodes)
        return [node for node in nodes if any(user not in inside for user in node.users)]


def _prefix(layout: RowLayout) -> tuple[int, ...]:
    """Positions of the tokens that are no patches."""
    if len(layout.tokens) > 1 and not is_packed(layout.tokens):
        return ()
    places = product(*(_patch_places(digit) for digit in layout.tokens))
    return tuple(place for place, patch in enumerate(places) if not all(patch))


def _patch_places(digit: Factor) -> list[bool]:
    """For each position of a digit whether patches lie there."""
    grids = grids_in((digit,))
    among = [(part, not grids or part in grids) for part in parts_of((digit,))]
    return [patch for part, patch in among for _ in range(int(size_of(part)))]
