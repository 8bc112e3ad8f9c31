"""Queries, keys, values and masks of a matched attention in one layout, whatever the model's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from tokenpass.blocks import Attention
from tokenpass.dims import Dim
from tokenpass.facts import Facts
from tokenpass.graph import operands
from tokenpass.grid import Grid
from tokenpass.layout import Layout, batch_factors

Env = Mapping[fx.Node, Any]


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention.

    Attributes:
        images: ``B``.
        heads: ``h``, of the queries.
        tokens: ``N`` queries of an image.
        keys: ``Nk`` keys and values of an image: fewer where they are pooled.
        width: ``d`` of a query and a key.
        value_width: ``dv`` of a value.
    """

    images: int
    heads: int
    tokens: int
    keys: int
    width: int
    value_width: int


@dataclass(frozen=True)
class AttentionParts:
    """Reads and writes the tensors of one attention."""

    facts: Facts
    match: Attention

    @property
    def shape(self) -> AttentionShape:
        match, layout = self.match, self._layout(self.match.query_dim)
        images = math.prod(int(factor.size) for factor in layout.batch)
        tokens, keys = (int(Grid(dim).count) for dim in (match.query_dim, match.key_dim))
        query, value = match.query.meta["val"], match.value.meta["val"]
        width = int(query.shape[match.channel[0]])
        heads = query.numel() // (images * tokens * width)
        return AttentionShape(images, heads, tokens, keys, width, int(value.shape[-1]))

    def heads(self, env: Env) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as ``(B, h, N, d)``; keys and values may have fewer heads."""
        reads = (self.match.query, self.match.key, self.match.value)
        query, key, value = (self.in_heads(node, env[node]) for node in reads)
        return query, key, value

    def in_heads(self, node: fx.Node, x: Tensor) -> Tensor:
        """Queries, keys or values, of the model's shape, as ``(B, h, N, d)``."""
        match, dims = self.match, self.facts.dims(node)
        if node is match.query:
            return self._layout(match.query_dim).heads(x, dims, match.channel[0])
        if node is match.key:
            return self._layout(match.key_dim).heads(x, dims, match.channel[1])
        return self._layout(dims[-2]).heads(x, dims, len(dims) - 1)

    def result(self, heads: Tensor) -> Tensor:
        """What the model reads, from ``(B, h, N, dv)``."""
        node = self.match.out
        dims, dtype = self.facts.dims(node), node.meta["val"].dtype
        layout = self._layout(self.match.query_dim)
        return layout.from_heads(heads.to(dtype), dims, len(dims) - 1)

    def bias(self, env: Env) -> Tensor | None:
        """All masks of an attention as one that broadcasts to ``(B, h, N, N)``."""
        layout = self._layout(self.match.key_dim)
        total: Tensor | None = None
        for mask in self.match.masks:
            seen = dict(self.facts.seen(mask.reader))[mask.node]
            wide = layout.score_map(env[mask.node], seen, mask.key_place, layout.grid.count)
            total = wide if total is None else total + wide
        return total

    def traced_maps(self, env: Env) -> Tensor:
        """The probabilities that the model computes, ``(B, h, N, N)``."""
        node = operands(self.match.out)[-2]
        dims = self.facts.dims(node)
        layout = self._layout(self.match.key_dim)
        return layout.score_map(env[node], dims, len(dims) - 1, layout.grid.count)

    def _layout(self, tokens: Dim) -> Layout:
        """Of values whose tokens run along a dimension of the query's batch."""
        grid = Grid(self.match.query_dim)
        return Layout(Grid(tokens), batch_factors(self.facts.dims(self.match.query), grid), int)
