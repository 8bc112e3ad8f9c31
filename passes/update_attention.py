"""Attention that is updated for the tokens that changed, in a graph that is being traced."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tokenpass.attention_rows import take
from tokenpass.exchange_cost import traced_exchange_count
from tokenpass.facts import Facts
from tokenpass.gates import Count
from tokenpass.gating import GatedAttention, Gating
from tokenpass.incremental import full_attention, update_attention
from tokenpass.passes.attention_parts import AttentionParts, Env
from tokenpass.passes.published_attention import Changed, PublishedAttention
from tokenpass.running_softmax import Running
from tokenpass.state import Slot, StateTable


class AttentionUpdates:
    """Keeps what attentions remember, and computes them from it."""

    def __init__(self, facts: Facts, plan: Gating, state: StateTable) -> None:
        self._facts = facts
        self._plan = plan
        self._state = state
        self._passed: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._exchanged: dict[int, Count | None] = {}
        self._old: dict[fx.Node, Tensor] = {}

    @staticmethod
    def slots(facts: Facts, plan: Gating, item: GatedAttention) -> list[Slot]:
        """What an attention remembers: for ``"exact"`` output, log of the row sums and drift of
        each row."""
        if item.mode != "exact":
            return PublishedAttention.slots(facts, plan, item)
        number, device = plan.attentions.index(item), item.attention.value.meta["val"].device
        shape = AttentionParts(facts, item.attention).shape
        images, heads, tokens = shape.images, shape.heads, shape.tokens
        shapes: dict[str, tuple[int, ...]] = {
            # As what follows wants it, the heads of a token lie together.
            "out": (images, tokens, heads, shape.value_width),
            "lse": (images, heads, tokens),
            "drift": (images, tokens),
        }
        return [
            Slot(("attention", number, kind), size, torch.float32, device)
            for kind, size in shapes.items()
        ]

    # ------------------------------------------------------------ full frames

    def compute(self, item: GatedAttention, env: Env) -> Tensor:
        """The attention of all tokens, as it is updated later; what that needs is remembered."""
        if item.mode != "exact":
            return self._published(item).compute(env)
        match, parts = item.attention, AttentionParts(self._facts, item.attention)
        state = self._running(item)
        full_attention(*parts.heads(env), match.scale, parts.bias(env), *state)
        return parts.result(state.out)

    def record(self, item: GatedAttention, env: Env) -> None:
        """Remember an attention that was computed as it was traced."""
        self._published(item).record(env)

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
        self._passed[region] = changed, valid
        exact = [a for a in self._plan.attentions if a.region == region and a.mode == "exact"]
        layout = self._plan.regions[region].layout
        if exchanged is None and not all(item.compiled for item in exact):
            exchanged = traced_exchange_count(layout.count, changed.shape[1])
        self._exchanged[region] = exchanged
        for item in exact:
            parts = AttentionParts(self._facts, item.attention)
            for node in (item.attention.key, item.attention.value):
                place = self._plan.regions[region].outputs.index(node)
                full = layout.full(self._state[region, "buffer", place], self._facts.dims(node))
                self._old[node] = take(parts.in_heads(node, full), changed)

    def update(self, item: GatedAttention, env: Env) -> Tensor:
        """The attention's output after its tokens in :meth:`remember` changed."""
        match, parts = item.attention, AttentionParts(self._facts, item.attention)
        changed, valid = self._passed[item.region]
        if item.mode != "exact":
            return self._published(item).update(Changed.of(changed, valid, item.cells), env)
        state = self._running(item)
        update_attention(
            *parts.heads(env),
            self._old[match.key],
            self._old[match.value],
            changed,
            match.scale,
            parts.bias(env),
            *state,
            self._exchanged[item.region],
        )
        return parts.result(state.out)

    def _published(self, item: GatedAttention) -> PublishedAttention:
        return PublishedAttention(self._facts, self._plan, item, self._state)

    def _running(self, item: GatedAttention) -> Running:
        number = self._plan.attentions.index(item)
        out, lse, drift = (self._state["attention", number, k] for k in ("out", "lse", "drift"))
        return Running(out.transpose(1, 2), lse, drift)
