"""The tensors of a cut: which tokens stay, where the others went. Runs while a graph is traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tokenpass.blocks import Attention
from tokenpass.dims import Dim
from tokenpass.facts import Facts
from tokenpass.graph import arguments
from tokenpass.held import hold
from tokenpass.kernels import attention_received
from tokenpass.layout import Layout
from tokenpass.merging import merged_sizes, owners, take
from tokenpass.pruning import Pruning, Stage
from tokenpass.selection import anchors_and_buffers, best
from tokenpass.views import Extent

Value = Callable[[fx.Node, int], Tensor]
Operand = Callable[[fx.Node, fx.Node, int], Tensor]


@dataclass(frozen=True)
class Survivors:
    """What is known of the tokens that a stage leaves. ``B`` images, ``N`` patch tokens at first.

    Attributes:
        count: ``K``, patch tokens that are left.
        kept: Their positions among the tokens before the cut, ``(B, K)``.
        positions: Their positions on the grid, ``(B, K)``.
        safe: Which of them are anchors and buffers, ``(B, K)``, bool.
        owner: Into which of them each token before the cut went, ``(B, N')``.
        owner_of_all: The same for each token of the grid, ``(B, N)``.
        sizes: How many tokens each stands for, ``(B, K)``, float32.

    The last three are ``None`` where tokens are discarded.
    """

    count: Extent
    kept: Tensor
    positions: Tensor
    safe: Tensor
    owner: Tensor | None
    owner_of_all: Tensor | None
    sizes: Tensor | None


class Stages:
    """Computes the survivors of each stage, once."""

    def __init__(
        self, facts: Facts, plan: Pruning, layout: Layout, value: Value, operand: Operand
    ) -> None:
        self._facts = facts
        self._plan = plan
        self._layout = layout
        self._value = value
        self._operand = operand
        self._made: dict[int, Survivors] = {}
        self._scored: dict[tuple[fx.Node, int], Tensor] = {}

    def __getitem__(self, number: int) -> Survivors:
        if number not in self._made:
            self._made[number] = self._cut(self._plan.stages[number - 1])
        return self._made[number]

    def _cut(self, stage: Stage) -> Survivors:
        before = self[stage.number - 1] if stage.number > 1 else None
        scores = self._scores(stage.attention, stage.number - 1 if stage.at is not None else 0)
        safe = before.safe if before else self._safe()
        count = self._layout.extent(stage.count)
        kept = best(safe, scores, count)
        if self._plan.steady:
            positions = before.positions.gather(1, kept) if before else kept
            kept = hold(kept, positions, self._layout.extent(self._plan.grid.count))
        return Survivors(
            count=count,
            kept=kept,
            positions=before.positions.gather(1, kept) if before else kept,
            safe=safe.gather(1, kept),
            **self._merged(stage, before, kept, count),
        )

    def _safe(self) -> Tensor:
        """Anchors and buffers among all patch tokens, ``(B, N)``."""
        plan, extent = self._plan, self._layout.extent
        shape = [extent(size) for size in plan.grid.shape]
        budget = extent(plan.stages[-1].count)
        scores = self._scores(plan.anchors, 0)
        return anchors_and_buffers(plan.method, scores, shape, budget)

    def _merged(
        self, stage: Stage, before: Survivors | None, kept: Tensor, count: Extent
    ) -> dict[str, Tensor | None]:
        if not self._plan.method.merges:
            return {"owner": None, "owner_of_all": None, "sizes": None}
        owner = owners(self._features(stage), kept)
        if before is None:
            sizes = torch.ones(owner.shape, dtype=torch.float32, device=owner.device)
            return {
                "owner": owner,
                "owner_of_all": owner,
                "sizes": merged_sizes(sizes, owner, count),
            }
        assert before.owner_of_all is not None
        assert before.sizes is not None
        return {
            "owner": owner,
            "owner_of_all": owner.gather(1, before.owner_of_all),
            "sizes": merged_sizes(before.sizes, owner, count),
        }

    def _features(self, stage: Stage) -> Tensor:
        """What similarity is measured on: the patch tokens of the stream, ``(B, N', C)``."""
        node = stage.at if stage.at is not None else self._plan.found.blocks[stage.block - 1].out
        dims = self._facts.dims(node)
        rows = self._layout.rows(self._value(node, stage.number - 1).detach(), dims)
        (place,) = self._layout.grid.carried_in(dims)
        return self._patches(rows, dims[place])

    # ------------------------------------------------------------ scores

    def key_bias(self, attention: Attention, sizes: Tensor) -> Tensor:
        """Logarithm of the size of each key, ``(B, Nk)``; a key that is no patch token has size
        one.

        With it a token that stands for ``s`` tokens weighs as much as ``s`` of them (ToMe, eq. 1).
        """
        unit = self._layout.grid.token_unit(attention.key_dim)
        pieces: list[Tensor] = []
        for size in self._layout.grid.layout(unit):
            if size is None:
                pieces.append(sizes.log())
            else:
                pieces.append(sizes.new_zeros((sizes.shape[0], self._layout.extent(size))))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def _scores(self, attention: Attention, level: int) -> Tensor:
        """How each patch token ranks, ``(B, N)`` in version ``level``: float32, no gradient."""
        key = (attention.softmax, level)
        if key not in self._scored:
            self._scored[key] = self._ranked(attention, level)
        return self._scored[key]

    def _ranked(self, attention: Attention, level: int) -> Tensor:
        ranking = self._plan.method.ranking
        if not attention.plain:
            return self._patches(self._from_map(attention, level), attention.key_dim)
        facts, layout = self._facts, self._layout
        query, key = (self._value(n, level).detach() for n in (attention.query, attention.key))
        q = layout.heads(query, facts.dims(attention.query), attention.channel[0])
        k = layout.heads(key, facts.dims(attention.key), attention.channel[1])
        if k.shape[1] != q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        if ranking == "random":
            return self._patches(torch.rand_like(k[:, 0, :, 0].float()), attention.key_dim)
        mask = self._mask(attention, level)
        if ranking == "class":
            q, mask = q[:, :, :1], None if mask is None else mask[:, :, :1]
        sizes = self[level].sizes if level else None
        bias = None if sizes is None else self.key_bias(attention, sizes)
        received = attention_received(q, k, attention.scale, bias, mask)
        return self._patches(received, attention.key_dim)

    def _mask(self, attention: Attention, level: int) -> Tensor | None:
        """All masks of an attention as one that broadcasts to ``(B, h, Nq, Nk)``."""
        total: Tensor | None = None
        for mask in attention.masks:
            x = self._operand(mask.reader, mask.node, level).detach()
            seen = dict(self._facts.seen(mask.reader))[mask.node]
            wide = self._layout.score_map(x, seen, mask.key_place, self._plan.count(level))
            total = wide if total is None else total + wide
        return total

    def _from_map(self, attention: Attention, level: int) -> Tensor:
        """From attention probabilities that the model computes anyway."""
        dims = self._facts.dims(attention.softmax)
        place = arguments(attention.softmax)["dim"] % len(dims)
        probabilities = self._value(attention.softmax, level).detach()
        return self._layout.column_mean(probabilities, dims, place)

    def _patches(self, x: Tensor, dim: Dim) -> Tensor:
        """The patch tokens of ``x`` ``(B, L, ...)``, whose tokens lie along ``dim``."""
        layout = self._layout.grid.layout(self._layout.grid.token_unit(dim))
        place = layout.index(None)
        before = sum((self._layout.extent(size) for size in layout[:place] if size is not None), 0)
        after = sum((self._layout.extent(s) for s in layout[place + 1 :] if s is not None), 0)
        return x[:, before : x.shape[1] - after]


def relative_positions(stages: Stages, source: int, target: int) -> Tensor:
    """Where the tokens of version ``target`` are among those of version ``source``, ``(B, K)``."""
    if source == 0:
        return stages[target].positions
    positions = stages[source + 1].kept
    for number in range(source + 2, target + 1):
        positions = take(positions, stages[number].kept)
    return positions
