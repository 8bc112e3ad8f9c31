"""Floating-point operations of a frame behind gates, as a polynomial in what passes them.

Counted is what ``torch.utils.flop_counter.FlopCounterMode`` counts: two for each multiply-add of
products, convolutions and attention. The symbols ``u0``, ``u1``, ... stand for the tokens of an
image that pass the gates of each size in :attr:`Gating.sizes`, class tokens included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from tokenpass.dims import Size, is_data
from tokenpass.exchange_cost import pairs
from tokenpass.facts import Facts, multiply_adds
from tokenpass.gating import Gating, Region, needed_nodes
from tokenpass.graph import operands, tensor_of
from tokenpass.passes.attention_parts import AttentionParts, AttentionShape

aten = torch.ops.aten

LINEAR = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
)


@dataclass(frozen=True)
class Updated:
    """An attention that is updated.

    Attributes:
        gate: The number of the gate of its queries, keys and values.
        shape: Its sizes.
        mode: ``"exact"``, ``"delta"`` or ``"scores"``.
        reads_maps: Whether the scores are computed anew, elsewhere.
        compiled: Whether code compiled for it does it.
        cells: If keys are pooled, the one that each token is a part of.
    """

    gate: int
    shape: AttentionShape
    mode: str
    reads_maps: bool
    compiled: bool
    cells: tuple[int, ...] = ()

    def work(self, rows: int, columns: int | None = None) -> int:
        """Multiply-adds of an update after ``rows`` rows of all images passed the gate.

        Args:
            rows: Queries that changed.
            columns: Keys that did; as many if ``None``, which is what is computed: a key that
                several tokens are pooled into is computed for each.
        """
        columns = rows if columns is None else columns
        shape, width = self.shape, 0 if self.reads_maps else self.shape.width
        if self.mode == "exact":
            each = shape.heads * (shape.value_width + width)
            passed = rows // shape.images
            return shape.images * each * pairs(shape.tokens, passed, compiled=self.compiled)
        scores = (rows * shape.keys + shape.tokens * columns) * width
        summed = shape.images * shape.keys if self.mode == "scores" else 2 * columns
        return shape.heads * (scores + shape.tokens * summed * shape.value_width)

    def columns(self, mask: Tensor) -> int:
        """Keys of all images that change with the tokens in ``mask`` ``(B, N)``, bool."""
        if not self.cells:
            return int(mask.sum())
        table = torch.tensor(self.cells).expand(mask.shape)
        hit = torch.zeros(mask.shape[0], self.shape.keys)
        return int(hit.scatter_add(1, table, mask.float()).count_nonzero())

    @property
    def dense(self) -> int:
        """Multiply-adds of the attention in full."""
        shape = self.shape
        both = shape.value_width + (0 if self.reads_maps else shape.width)
        return shape.images * shape.heads * shape.tokens * shape.keys * both


@dataclass(frozen=True)
class Operations:
    """Multiply-adds of a frame.

    Attributes:
        rows: For each gate, those of its region for one row; ``linear`` of it of linear layers.
        compared: For each gate, the elements that it compares in a frame.
        dense: What every frame computes; ``products`` of it of two computed operands.
        updated: The attentions that are not computed anew.
    """

    rows: Sequence[int] = ()
    linear: Sequence[int] = ()
    compared: Sequence[int] = ()
    dense: int = 0
    products: int = 0
    updated: Sequence[Updated] = ()

    def flops(self, passed: Sequence[int]) -> int:
        """Floating-point operations of a frame, from the rows that passed each gate."""
        linear = sum(each * rows for each, rows in zip(self.rows, passed, strict=True))
        return 2 * (linear + self.dense + sum(a.work(passed[a.gate]) for a in self.updated))

    def counted(self, masks: Sequence[Tensor], *, full: bool) -> dict[str, int]:
        """Operations in the categories of the published code's counters, bias and adds left out.

        Args:
            masks: For each gate the tokens that passed, ``(B, N)``, bool.
            full: Whether everything was computed.
        """
        passed = [int(mask.sum()) for mask in masks]
        linear, everything = (
            sum(each * rows for each, rows in zip(work, passed, strict=True))
            for work in (self.linear, self.rows)
        )
        if full:
            products = self.products + sum(item.dense for item in self.updated)
            return {"linear": linear, "einsum": everything - linear, "matmul": products}
        counts = {
            "linear": linear,
            "einsum": everything - linear,
            "matmul": self.products,
            "gate": sum(self.compared),
        }
        for item in self.updated:
            columns, shape = item.columns(masks[item.gate]), item.shape
            counts["matmul"] += item.work(passed[item.gate], columns)
            if item.mode == "delta":
                values = shape.heads * shape.value_width
                maps = shape.heads * shape.tokens
                counts["gate"] += shape.images * shape.keys * (values + maps)
                added = (columns + 2 * shape.images * shape.tokens) * values
                counts["accumulator"] = counts.get("accumulator", 0) + added
        return counts


def update_symbols(plan: Gating) -> list[sympy.Symbol]:
    """One for each of ``plan.sizes``."""
    return [sympy.Symbol(f"u{n}", integer=True, positive=True) for n in range(len(plan.sizes))]


def gated_cost(plan: Gating, work: Operations, counts: Sequence[int]) -> Size:
    """FLOPs of a later frame.

    Args:
        plan: The gates.
        work: From :func:`operations`.
        counts: What passes, for each of ``plan.sizes``: an attention is updated or computed anew,
            whichever is faster then.
    """
    symbols = dict(zip(plan.sizes, update_symbols(plan), strict=True))
    numbers = dict(zip(plan.sizes, counts, strict=True))
    total: Size = sympy.Integer(work.dense)
    for region, each in zip(plan.regions, work.rows, strict=True):
        total += each * region.layout.images * symbols[region.size]
    for item in work.updated:
        region = plan.regions[item.gate]
        images, count, symbol = region.layout.images, numbers[region.size], symbols[region.size]
        now, next_ = item.work(images * count), item.work(images * (count + 1))
        slope = next_ - now if now < item.dense and next_ > now else 0
        total += now + slope * (symbol - count)
    return sympy.expand(2 * total)


def dense_work(facts: Facts, plan: Gating, *, products: bool = False) -> Size:
    """Multiply-adds that every frame pays; only those of products of computed values if asked."""
    elsewhere = {node for region in plan.regions for node in region.nodes}
    elsewhere |= {item.attention.out for item in plan.attentions}
    total: Size = sympy.Integer(0)
    for node in needed_nodes(facts.graph, plan) - elsewhere:
        effect = facts.effects[node]
        data = [o for o in operands(node) if any(is_data(dim) for dim in facts.dims(o))]
        if not products or len(data) > 1:
            total += multiply_adds(effect.work)
    return total


def row_work(facts: Facts, region: Region, *, linear: bool = False) -> Size:
    """Multiply-adds of a region for one row; only those of linear layers if asked."""
    total: Size = sympy.Integer(0)
    for node in region.nodes:
        if linear and node.target not in LINEAR:
            continue
        for work in facts.effects[node].work:
            total += work.times * sympy.Mul(*region.layout.sizes((*work.rows, *work.inner), 1))
    return total


def operations(facts: Facts, plan: Gating) -> Operations:
    """What :class:`Operations` counts."""
    return Operations(
        rows=[int(row_work(facts, region)) for region in plan.regions],
        linear=[int(row_work(facts, region, linear=True)) for region in plan.regions],
        compared=[
            sum(int(tensor_of(node).numel()) for node in region.inputs) for region in plan.regions
        ],
        dense=int(dense_work(facts, plan)),
        products=int(dense_work(facts, plan, products=True)),
        updated=[
            Updated(
                item.region,
                AttentionParts(facts, item.attention).shape,
                item.mode,
                item.reads_maps,
                item.compiled,
                item.cells,
            )
            for item in plan.attentions
        ],
    )
