"""The forms in which the paper updates attention: scores, and products with values, of all pairs.

Eventful Transformers (arXiv 2308.13494), sections 4.2 and 4.3. Shapes: ``B`` images, ``h`` heads,
``N`` queries, ``Nk`` keys (fewer where they are pooled), ``U`` tokens that passed a gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpass.attention_rows import put_, repeated, take
from tokenpass.facts import Facts
from tokenpass.gating import GatedAttention, Gating
from tokenpass.passes.attention_parts import AttentionParts, Env
from tokenpass.state import Slot, StateTable


@dataclass(frozen=True)
class Changed:
    """What passed a gate, as rows of queries and as columns of keys.

    Attributes:
        rows: Positions of queries, ``(B, U)``.
        rows_valid: Which of them passed; the others are fillers. ``None`` if all did.
        columns: Positions of keys, ``(B, U)``; one that several tokens are pooled into is there
            once for each.
        columns_valid: Which of these keys changed; ``None`` if all did.
        once: The first place of each key in ``columns``; ``None`` if there is no other.
    """

    rows: Tensor
    rows_valid: Tensor | None
    columns: Tensor
    columns_valid: Tensor | None
    once: Tensor | None = None

    @classmethod
    def of(cls, positions: Tensor, valid: Tensor | None, cells: tuple[int, ...]) -> Changed:
        """From the tokens that passed and, if keys are pooled, the key of each token."""
        if not cells:
            return cls(positions, valid, positions, valid)
        table = torch.tensor(cells, device=positions.device)
        columns, order = table[positions].sort(dim=1)
        once = torch.ones_like(columns, dtype=torch.bool)
        once[:, 1:] = columns[:, 1:] != columns[:, :-1]
        if valid is None:
            return cls(positions, None, columns, None, once)
        hit = columns.new_zeros(columns.shape[0], max(cells) + 1)
        hit = hit.scatter_add(1, columns, valid.gather(1, order).to(hit.dtype))
        return cls(positions, valid, columns, hit.gather(1, columns) > 0, once)

    def of_rows(self, new: Tensor, before: Tensor) -> Tensor:
        """``new`` ``(B, h, U, Nk)``, and what was there ``before`` where rows are fillers."""
        if self.rows_valid is None:
            return new
        return torch.where(self.rows_valid[:, None, :, None], new, before)

    def of_columns(self, new: Tensor, before: Tensor) -> Tensor:
        """``new`` ``(B, h, N, U)``, and what was there ``before`` where columns are fillers."""
        if self.columns_valid is None:
            return new
        return torch.where(self.columns_valid[:, None, None], new, before)

    def each_once(self, values: Tensor) -> Tensor:
        """``values`` ``(B, h, U, dv)`` as they are summed over: no key is counted twice."""
        return values if self.once is None else values * self.once[:, None, :, None]


class PublishedAttention:
    """An attention of which the scores, and for ``"delta"`` its product, are remembered."""

    def __init__(self, facts: Facts, plan: Gating, item: GatedAttention, state: StateTable) -> None:
        self._item = item
        self._parts = AttentionParts(facts, item.attention)
        self._number = plan.attentions.index(item)
        self._state = state

    @staticmethod
    def slots(facts: Facts, plan: Gating, item: GatedAttention) -> list[Slot]:
        """For ``"scores"`` these; for ``"delta"`` also gated probabilities, values and output."""
        number = plan.attentions.index(item)
        query, value = (n.meta["val"] for n in (item.attention.query, item.attention.value))
        shape = AttentionParts(facts, item.attention).shape
        lead = (shape.images, shape.heads)
        maps = (*lead, shape.tokens, shape.keys)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if item.mode == "delta":
            shapes["maps"] = maps, value.dtype
            shapes["values"] = (*lead, shape.keys, shape.value_width), value.dtype
            shapes["out"] = (*lead, shape.tokens, shape.value_width), value.dtype
        if not item.reads_maps:
            shapes["scores"] = maps, query.dtype
        return [
            Slot(("attention", number, kind), size, dtype, value.device)
            for kind, (size, dtype) in shapes.items()
        ]

    # ------------------------------------------------------------ full frames

    def compute(self, env: Env) -> Tensor:
        """The attention of all tokens; its scores are remembered."""
        return self._parts.result(self._remembered_maps(env) @ self._heads(env)[2])

    def record(self, env: Env) -> None:
        """Remember an attention that was computed as it was traced."""
        value, maps = self._heads(env)[2], self._remembered_maps(env)
        self._slot("maps").copy_(maps)
        self._slot("values").copy_(value)
        self._slot("out").copy_(maps @ value)

    def _remembered_maps(self, env: Env) -> Tensor:
        """Probabilities ``(B, h, N, Nk)``; their scores are remembered."""
        if self._item.reads_maps:
            return self._parts.traced_maps(env)
        query, key, value = self._heads(env)
        scores = (query * self._item.attention.scale) @ key.transpose(-1, -2)
        self._slot("scores").copy_(scores)
        return self._probabilities(scores, value, env)

    # ------------------------------------------------------------ later frames

    def update(self, changed: Changed, env: Env) -> Tensor:
        """The attention's output after some tokens changed."""
        query, key, value = self._heads(env)
        if self._item.reads_maps:
            now = self._parts.traced_maps(env)
        else:
            now = self._probabilities(self._scores(query, key, changed), value, env)
        out = now @ value if self._item.mode == "scores" else self._product(now, value, changed)
        return self._parts.result(out)

    def _probabilities(self, scores: Tensor, value: Tensor, env: Env) -> Tensor:
        """As they meet the values: models may have these in another precision than the scores."""
        bias = self._parts.bias(env)
        return (scores if bias is None else scores + bias).softmax(-1).to(value.dtype)

    def _scores(self, query: Tensor, key: Tensor, changed: Changed) -> Tensor:
        """Buffered scores, of which the rows and columns of what changed are new (section 4.2)."""
        scores, scaled = self._slot("scores"), query * self._item.attention.scale
        rows = take(scaled, changed.rows) @ key.transpose(-1, -2)
        rows = changed.of_rows(rows, take(scores, changed.rows))
        put_(scores, changed.rows, rows)
        columns = scaled @ take(key, changed.columns).transpose(-1, -2)
        columns = changed.of_columns(columns, take(scores, changed.columns, 3))
        put_(scores, changed.columns, columns, 3)
        return scores

    def _product(self, now: Tensor, value: Tensor, changed: Changed) -> Tensor:
        """The delta gate of the product of probabilities and values (section 4.3)."""
        maps, values, out = (self._slot(kind) for kind in ("maps", "values", "out"))
        before = take(maps, changed.columns, 3)
        columns = changed.of_columns(take(now, changed.columns, 3), before)
        new = take(value, changed.columns)
        moved = new - take(values, changed.columns)
        out.add_(columns @ changed.each_once(moved))
        out.add_((columns - before) @ changed.each_once(new - moved))
        put_(values, changed.columns, new)
        put_(maps, changed.columns, columns, 3)
        return out.clone()

    def _heads(self, env: Env) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, all with as many heads."""
        query, key, value = self._parts.heads(env)
        heads = query.shape[1]
        return query, repeated(key, heads), repeated(value, heads)

    def _slot(self, kind: str) -> Tensor:
        return self._state["attention", self._number, kind]
