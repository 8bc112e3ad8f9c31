"""Attention that is updated for the tokens that changed, in a graph that is being traced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tokenpass.attention_rows import put_, take
from tokenpass.blocks import Attention
from tokenpass.exchange_cost import traced_exchange_count
from tokenpass.facts import Facts
from tokenpass.gates import Count
from tokenpass.gating import GatedAttention, Gating
from tokenpass.graph import operands
from tokenpass.grid import Grid
from tokenpass.incremental import full_attention, update_attention
from tokenpass.layout import Layout, batch_factors
from tokenpass.running_softmax import Running
from tokenpass.state import Slot, StateTable

Env = Mapping[fx.Node, Any]


class AttentionUpdates:
    """Keeps what attentions remember, and computes them from it."""

    def __init__(self, facts: Facts, plan: Gating, state: StateTable) -> None:
        self._facts = facts
        self._plan = plan
        self._state = state
        self._changed: dict[int, Tensor] = {}
        self._valid: dict[int, Tensor | None] = {}
        self._exchanged: dict[int, Count | None] = {}
        self._old: dict[fx.Node, Tensor] = {}

    @staticmethod
    def slots(facts: Facts, plan: Gating, item: GatedAttention) -> list[Slot]:
        """What an attention remembers: for ``"exact"`` output, log of the row sums and drift of
        each row; for ``"scores"`` the scores; for ``"delta"`` them, gated probabilities, gated
        values and output."""
        number = plan.attentions.index(item)
        value = item.attention.value.meta["val"]
        images, heads, tokens, _, width = attention_shape(facts, item.attention)
        rows, maps = (images, heads, tokens), (images, heads, tokens, tokens)
        dtype = torch.float32 if item.mode == "exact" else value.dtype
        # As what follows wants it, the heads of a token lie together.
        joint = (images, tokens, heads, width)
        shapes: dict[str, tuple[int, ...]] = {}
        if item.mode == "exact":
            shapes = {"out": joint, "lse": rows, "drift": (images, tokens)}
        elif item.mode == "delta":
            shapes = {"maps": maps, "values": (*rows, width), "out": (*rows, width)}
        if item.mode != "exact" and not item.reads_maps:
            shapes |= {"scores": maps}
        return [
            Slot(("attention", number, kind), shape, dtype, value.device)
            for kind, shape in shapes.items()
        ]

    # ------------------------------------------------------------ full frames

    def compute(self, item: GatedAttention, env: Env) -> Tensor:
        """The attention of all tokens, as it is updated later; what that needs is remembered."""
        match = item.attention
        if item.mode == "scores":
            value = self._heads(match, env)[2]
            return self._result(item, self._remembered_maps(item, env) @ value)
        state = self._running(item)
        full_attention(*self._heads(match, env), match.scale, self._bias(match, env), *state)
        return self._result(item, state.out)

    def record(self, item: GatedAttention, env: Env) -> None:
        """Remember an attention that was computed as it was traced."""
        value, maps = self._heads(item.attention, env)[2], self._remembered_maps(item, env)
        self._slot(item, "maps").copy_(maps)
        self._slot(item, "values").copy_(value)
        self._slot(item, "out").copy_(maps @ value)

    def _remembered_maps(self, item: GatedAttention, env: Env) -> Tensor:
        """Probabilities ``(B, h, N, N)``; their scores are remembered."""
        match = item.attention
        if item.reads_maps:
            return self._traced_maps(match, env)
        query, key, _ = self._heads(match, env)
        scores = (query * match.scale) @ key.transpose(-1, -2)
        self._slot(item, "scores").copy_(scores)
        return _probabilities(scores, self._bias(match, env))

    # ------------------------------------------------------------ later frames

    def remember(
        self, region: int, changed: Tensor, valid: Tensor | None, exchanged: Count | None
    ) -> None:
        """Keep the keys and values of the tokens that a gate is about to overwrite.

        Args:
            region: Number of the gate.
            changed: Positions of what passes, ``(B, U)``.
            valid: Which of them do; the others are fillers. ``None`` if all do.
            exchanged: See :func:`~tokenpass.exchange_cost.exchange_count`; ``None`` if it depends
                on what passes.
        """
        self._changed[region] = changed
        self._valid[region] = valid
        exact = [a for a in self._plan.attentions if a.region == region and a.mode == "exact"]
        if exchanged is None and not all(item.compiled for item in exact):
            tokens = self._plan.regions[region].layout.count
            exchanged = traced_exchange_count(tokens, changed.shape[1])
        self._exchanged[region] = exchanged
        for item in exact:
            for node in (item.attention.key, item.attention.value):
                place = self._plan.regions[region].outputs.index(node)
                dims = self._facts.dims(node)
                rows = self._state[region, "buffer", place]
                full = self._plan.regions[region].layout.full(rows, dims)
                channel = _channel(item.attention, node, len(dims))
                heads = _layout(self._facts, item.attention).heads(full, dims, channel)
                self._old[node] = take(heads, changed)

    def update(self, item: GatedAttention, env: Env) -> Tensor:
        """The attention's output after its tokens in :meth:`remember` changed."""
        match = item.attention
        query, key, value = self._heads(match, env)
        changed, bias = self._changed[item.region], self._bias(match, env)
        if item.mode != "exact":
            now = (
                self._traced_maps(match, env)
                if item.reads_maps
                else _probabilities(self._scores(item, query, key, changed), bias)
            )
            out = now @ value if item.mode == "scores" else self._delta(item, now, value, changed)
            return self._result(item, out)
        state = self._running(item)
        update_attention(
            query,
            key,
            value,
            self._old[match.key],
            self._old[match.value],
            changed,
            match.scale,
            bias,
            *state,
            self._exchanged[item.region],
        )
        return self._result(item, state.out)

    def _scores(self, item: GatedAttention, query: Tensor, key: Tensor, changed: Tensor) -> Tensor:
        """Buffered scores, of which the rows and columns of what changed are new (section 4.2)."""
        scores, scaled = self._slot(item, "scores"), query * item.attention.scale
        rows = take(scaled, changed) @ key.transpose(-1, -2)
        put_(scores, changed, self._of_valid(item, rows, take(scores, changed), 2))
        columns = scaled @ take(key, changed).transpose(-1, -2)
        put_(scores, changed, self._of_valid(item, columns, take(scores, changed, 3), 3), 3)
        return scores

    def _delta(self, item: GatedAttention, now: Tensor, value: Tensor, changed: Tensor) -> Tensor:
        """The delta gate of the product of probabilities and values (section 4.3)."""
        maps, values, out = (self._slot(item, kind) for kind in ("maps", "values", "out"))
        before = take(maps, changed, 3)
        columns = self._of_valid(item, take(now, changed, 3), before, 3)
        new = take(value, changed)
        moved_values = new - take(values, changed)
        moved_maps = columns - before
        out.add_(columns @ moved_values)
        out.add_(moved_maps @ (new - moved_values))
        put_(values, changed, new)
        put_(maps, changed, columns, 3)
        return out.clone()

    def _of_valid(self, item: GatedAttention, new: Tensor, before: Tensor, dim: int) -> Tensor:
        """``new`` ``(B, h, ...)``, and what was there ``before`` where ``dim`` holds fillers."""
        valid = self._valid[item.region]
        if valid is None:
            return new
        return torch.where(
            valid[:, None, None] if dim == 3 else valid[:, None, :, None], new, before
        )

    # ------------------------------------------------------------ tensors

    def _result(self, item: GatedAttention, heads: Tensor) -> Tensor:
        """What the model reads, from ``(B, h, N, dv)``."""
        node = item.attention.out
        dims, dtype = self._facts.dims(node), node.meta["val"].dtype
        return _layout(self._facts, item.attention).from_heads(heads.to(dtype), dims, len(dims) - 1)

    def _running(self, item: GatedAttention) -> Running:
        out, lse, drift = (self._slot(item, kind) for kind in ("out", "lse", "drift"))
        return Running(out.transpose(1, 2), lse, drift)

    def _slot(self, item: GatedAttention, kind: str) -> Tensor:
        return self._state["attention", self._plan.attentions.index(item), kind]

    def _heads(self, match: Attention, env: Env) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as ``(B, h, N, d)``; keys and values may have fewer heads."""
        layout = _layout(self._facts, match)

        def heads(node: fx.Node) -> Tensor:
            dims = self._facts.dims(node)
            return layout.heads(env[node], dims, _channel(match, node, len(dims)))

        return heads(match.query), heads(match.key), heads(match.value)

    def _bias(self, match: Attention, env: Env) -> Tensor | None:
        """All masks of an attention as one that broadcasts to ``(B, h, N, N)``."""
        layout = _layout(self._facts, match)
        total: Tensor | None = None
        for mask in match.masks:
            seen = dict(self._facts.seen(mask.reader))[mask.node]
            count = layout.grid.count
            wide = layout.score_map(env[mask.node], seen, mask.key_place, count)
            total = wide if total is None else total + wide
        return total

    def _traced_maps(self, match: Attention, env: Env) -> Tensor:
        """The probabilities that the model computes, ``(B, h, N, N)``."""
        node = operands(match.out)[-2]
        dims = self._facts.dims(node)
        layout = _layout(self._facts, match)
        return layout.score_map(env[node], dims, len(dims) - 1, layout.grid.count)


def _probabilities(scores: Tensor, bias: Tensor | None) -> Tensor:
    return (scores if bias is None else scores + bias).softmax(-1)


def _layout(facts: Facts, match: Attention) -> Layout:
    grid = Grid(match.key_dim)
    return Layout(grid, batch_factors(facts.dims(match.query), grid), int)


def _channel(match: Attention, node: fx.Node, rank: int) -> int:
    if node is match.query:
        return match.channel[0]
    return match.channel[1] if node is match.key else rank - 1


def attention_shape(facts: Facts, match: Attention) -> tuple[int, int, int, int, int]:
    """Images, heads, tokens, width of a query and of a value."""
    layout = _layout(facts, match)
    images = math.prod(int(factor.size) for factor in layout.batch)
    tokens = int(layout.grid.count)
    query, value = match.query.meta["val"], match.value.meta["val"]
    width = int(query.shape[match.channel[0]])
    return images, query.numel() // (images * tokens * width), tokens, width, int(value.shape[-1])
