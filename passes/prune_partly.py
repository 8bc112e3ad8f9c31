"""Rewrite a graph so that tokens leave its token-wise parts: the graph is traced again.

At a cut the stream's tokens are merged into those that stay, and every token takes the value of the
one it went into. Behind it, token-wise regions run on the rows of the tokens that stayed; a token
that left takes what was computed for the one it went into (merged), or nothing is added to it
(discarded). All else runs as it was traced, on all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tokenpass import torch_internals as internals
from tokenpass.capture import Captured
from tokenpass.cuts import as_outputs
from tokenpass.facts import Facts
from tokenpass.gating import Region
from tokenpass.merging import merge, merged_sizes, owners, rows_of_all, take
from tokenpass.partial import Cut, PartialPruning
from tokenpass.passes.graph_run import GraphRun
from tokenpass.selection import anchors_and_buffers, best


def prune_partly(
    captured: Captured, facts: Facts, plan: PartialPruning, *, record: bool = False
) -> fx.GraphModule:
    """The graph with the cuts of ``plan``.

    Its outputs are those of the original and, after them, the grid positions of the surviving patch
    tokens ``(B, K)``, and what :func:`~tokenpass.cuts.as_outputs` tells of the cuts if asked.
    """

    def run(*inputs: Any) -> Any:
        return _Run(captured, facts, plan, record).run(inputs)

    module = internals.trace(run, captured.inputs, captured.mode)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


@dataclass(frozen=True)
class _Left:
    """What is known of the tokens that a cut leaves. ``B`` images, ``N`` patch tokens at first.

    Attributes:
        positions: Their positions on the grid, ``(B, K)``.
        safe: Which of them are anchors and buffers, ``(B, K)``, bool.
        owner: Into which of them each token of the grid went, ``(B, N)``.
        sizes: How many tokens each stands for, ``(B, K)``, float32.
        rows: Rows of these and of the fixed tokens, ``(B * (K + fixed),)``.
        back: For each row of a full value, which of ``rows`` it is made of.
    """

    positions: Tensor
    safe: Tensor
    owner: Tensor
    sizes: Tensor
    rows: Tensor
    back: Tensor


class _Run(GraphRun):
    rule = "prune partly"

    def __init__(
        self, captured: Captured, facts: Facts, plan: PartialPruning, record: bool
    ) -> None:
        super().__init__(captured, facts)
        self.record = record
        self.plan = plan
        self.cuts = {cut.at: cut for cut in plan.cuts}
        self.region_of = {
            node: (region, number) for region, number in plan.regions for node in region.nodes
        }
        self.left: dict[int, _Left] = {}

    def visit(self, node: fx.Node) -> None:
        if node in self.region_of:
            region, number = self.region_of[node]
            if any(output not in self.env for output in region.outputs):
                self._ensure_cut(self.plan.cuts[number - 1])
                self._on_those_left(region, self.left[number])
            return
        self.env[node] = self.compute(node)
        if node in self.cuts:
            self._cut(self.cuts[node])

    def finish(self, output: fx.Node) -> Any:
        last = self.left[len(self.plan.cuts)].positions
        merges = self.plan.method.merges
        cuts = [(left.positions, left.owner if merges else None) for left in self.left.values()]
        told = as_outputs(cuts) if self.record else ()
        return (*self.outputs(output, frozenset()), last, *told)

    # ------------------------------------------------------------ a cut

    def _ensure_cut(self, cut: Cut) -> None:
        self.ensure(cut.at)
        if cut.number not in self.left:  # at an input, which is there before anything is computed
            self._cut(cut)

    def _cut(self, cut: Cut) -> None:
        """Let tokens leave the stream."""
        layout, dims = self.plan.layout, self.facts.dims(cut.at)
        rows = layout.rows(self.env[cut.at], dims)
        sequence = rows.reshape(layout.images, layout.count, -1)
        places = self._patch_places(rows.device)
        patches = sequence.index_select(1, places)
        before = self.left.get(cut.number - 1)
        here = patches if before is None else take(patches, before.positions)
        scores = self._scores(here.detach())
        if before is None:
            budget = self.plan.cuts[-1].count
            safe = anchors_and_buffers(self.plan.method, scores, self.plan.shape, budget)
        else:
            safe = before.safe
        kept = best(safe, scores, cut.count)
        owner = owners(here.detach(), kept)
        sizes = torch.ones_like(owner, dtype=torch.float32) if before is None else before.sizes
        self.left[cut.number] = left = self._those_left(before, kept, owner, sizes, safe, places)
        if not self.plan.method.merges or self.plan.apart or here.shape[1] == cut.count:
            return
        merged = take(merge(here, sizes, owner, left.sizes), left.owner)
        index = places.reshape(1, -1, 1).expand(layout.images, -1, sequence.shape[2])
        restored = sequence.scatter(1, index, merged)
        self.env[cut.at] = layout.full(restored.reshape(rows.shape), dims)

    def _patch_places(self, device: torch.device) -> Tensor:
        """Where the patch tokens are among the tokens of an image, ``(N,)``."""
        fixed = set(self.plan.fixed)
        places = [place for place in range(self.plan.layout.count) if place not in fixed]
        return torch.tensor(places, device=device)

    def _scores(self, patches: Tensor) -> Tensor:
        """How much each patch token ``(B, N, C)`` stands out of its image, ``(B, N)``.

        The distance from the mean token: attention that is computed in windows or over pooled keys
        does not compare all tokens of an image.
        """
        wide = patches.float()
        if self.plan.method.ranking == "random":
            return torch.rand_like(wide[:, :, 0])
        distance: Tensor = torch.linalg.vector_norm(wide - wide.mean(1, keepdim=True), dim=2)
        return distance

    def _those_left(
        self,
        before: _Left | None,
        kept: Tensor,
        owner: Tensor,
        sizes: Tensor,
        safe: Tensor,
        places: Tensor,
    ) -> _Left:
        layout = self.plan.layout
        positions = kept if before is None else before.positions.gather(1, kept)
        count = kept.shape[1]
        owner_of_all = owner if before is None else owner.gather(1, before.owner)
        fixed = torch.tensor(self.plan.fixed, dtype=torch.int64, device=kept.device)
        tokens = torch.cat([fixed.expand(layout.images, -1), places[positions]], 1)
        back = torch.empty(
            layout.images, layout.count, dtype=torch.int64, device=kept.device
        ).index_copy(1, places, owner_of_all + len(self.plan.fixed))
        own = torch.arange(len(self.plan.fixed), device=kept.device)
        back = back.index_copy(1, fixed, own.expand(layout.images, -1))
        return _Left(
            positions=positions,
            safe=safe.gather(1, kept),
            owner=owner_of_all,
            sizes=merged_sizes(sizes, owner, count),
            rows=rows_of_all(tokens, layout.count),
            back=rows_of_all(back, tokens.shape[1]),
        )

    # ------------------------------------------------------------ behind it

    def _on_those_left(self, region: Region, left: _Left) -> None:
        for node in region.inputs:
            self.ensure(node)
        taken = [self.rows(region, node).index_select(0, left.rows) for node in region.inputs]
        computed = self.on_some(region, taken, left.rows)
        for node, new in zip(region.outputs, computed, strict=True):
            dims = self.facts.dims(node)
            if self.plan.method.merges:
                full = new.index_select(0, left.back)
            else:
                total = left.back.shape[0]
                full = new.new_zeros(total, new.shape[1]).index_copy(0, left.rows, new)
            self.env[node] = region.layout.full(full, dims)
