"""The plan of eventful gating: which regions, behind which gates. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from tokenpass import native
from tokenpass.blocks import Attention, Block, Mlp, NoMatch
from tokenpass.exchange_cost import exchange_count
from tokenpass.graph import operands
from tokenpass.methods import Eventful
from tokenpass.rows import RowLayout
from tokenpass.selection import token_budget


@dataclass(frozen=True)
class Region:
    """Token-wise operations that run on the tokens that a gate lets through.

    Attributes:
        layout: How images and tokens lie in its values.
        nodes: The operations, in execution order.
        inputs: What they read that has a value for each token.
        outputs: Those of them that are read outside.
        fixed: Positions of the tokens that always pass.
    """

    layout: RowLayout
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    fixed: tuple[int, ...]

    @property
    def patches(self) -> int:
        """Tokens of an image that a budget is a share of."""
        return self.layout.count - len(self.fixed)

    @property
    def size(self) -> tuple[int, int]:
        """Patch and fixed tokens of an image."""
        return self.patches, len(self.fixed)


@dataclass(frozen=True)
class GatedAttention:
    """An attention that is updated, and not computed anew.

    Attributes:
        attention: The match.
        region: Which region its queries, keys and values come from, by number.
        mode: ``"exact"``, ``"delta"`` or ``"scores"``.
        cells: If keys and values are pooled, the one that each token is a part of.
    """

    attention: Attention
    region: int
    mode: str
    cells: tuple[int, ...] = ()

    @property
    def compiled(self) -> bool:
        """Whether code compiled for it updates it (:mod:`tokenpass.native`)."""
        match = self.attention
        reads = (match.query, match.key, match.value, *(mask.node for mask in match.masks))
        return self.mode == "exact" and native.available(*(node.meta["val"] for node in reads))

    @property
    def reads_maps(self) -> bool:
        """Whether the model's own probabilities are read, and not computed from buffered scores."""
        return self.mode == "delta" and not self.attention.plain


@dataclass(frozen=True)
class Gating:
    """All gates of a graph.

    Attributes:
        method: What was asked for.
        regions: In execution order.
        attentions: Those that are updated; all others are computed as they were traced.
        blocks: What the patterns found around windows and grids alike.
        mlps: Every MLP.
        misses: What is left as it was.
    """

    method: Eventful
    regions: Sequence[Region]
    attentions: Sequence[GatedAttention]
    blocks: Sequence[Block]
    mlps: Sequence[Mlp]
    misses: Sequence[NoMatch]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Patch and fixed tokens of the gates, each pair once: a count is passed for each."""
        return tuple(dict.fromkeys(region.size for region in self.regions))

    @property
    def exchanging(self) -> tuple[tuple[int, int], ...]:
        """Those of ``sizes`` whose gates feed attentions that ask how many keys to exchange."""
        asking = (x.region for x in self.attentions if x.mode == "exact" and not x.compiled)
        return tuple(dict.fromkeys(self.regions[number].size for number in asking))


def passing(method: Eventful, patches: int) -> int:
    """How many of an image's patch tokens a gate lets through; all of them without a budget."""
    if method.keep is None:
        return patches
    if method.compat and isinstance(method.keep, float):
        return max(1, int(method.keep * patches))
    return token_budget(method.keep, patches)


def passing_counts(plan: Gating, method: Eventful) -> dict[tuple[int, int], int]:
    """Tokens of an image, fixed ones included, that pass the gates of each of ``plan.sizes``."""
    return {(patches, fixed): passing(method, patches) + fixed for patches, fixed in plan.sizes}


def budget(plan: Gating, method: Eventful) -> list[int]:
    """The numbers that an incremental graph takes: ``plan``'s for a budget that may have changed.

    For each of ``plan.sizes`` what passes, then for each of ``plan.exchanging`` how many keys are
    exchanged; nothing where these depend on the frame.
    """
    if method.keep is None:
        return []
    counts = passing_counts(plan, method)
    given = [*counts.values()]
    if method.threshold is None:
        given += [exchange_count(sum(size), counts[size]) for size in plan.exchanging]
    return given


def gateable(block: Block) -> list[fx.Node]:
    """What a gate can be in front of in a block: what its attention reads, and linear layers."""
    reads = [n for match in block.attentions for n in (match.query, match.key, match.value)]
    return [*reads, *(linear for mlp in block.mlps for linear in mlp.linears)]


def needed_nodes(graph: fx.Graph, plan: Gating) -> set[fx.Node]:
    """What the incremental graph has to compute, in terms of the original's nodes."""
    reads: dict[fx.Node, list[fx.Node]] = {}
    for item in plan.attentions:
        match = item.attention
        masks = [mask.node for mask in match.masks]
        maps = operands(match.out)[-2:-1] if item.reads_maps else []
        reads[match.out] = [match.query, match.key, match.value, *masks, *maps]
    region_of = {node: region for region in plan.regions for node in region.nodes}
    needed: set[fx.Node] = set()
    pending = [node for node in graph.nodes if node.op == "output" or node.is_impure()]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += reads.get(node, node.all_input_nodes)
            pending += region_of[node].nodes if node in region_of else ()
    return needed
