"""Faults that our passes could have, each put in by replacing one function.

The properties must notice every one of them: a checker that does not is no checker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fuzz.spec import Attention, Block, Case, Encoder
from tokenpass import layout
from tokenpass.layout import Layout
from tokenpass.passes import conversions, gate_runs, prune, stages
from tokenpass.passes.conversions import Conversions
from tokenpass.passes.gate_runs import IncrementalRun
from tokenpass.passes.stages import Stages
from tokenpass.rows import RowLayout


def positions_case(**changes: Any) -> Case:
    """Two blocks, a class token, a register, relative positions that differ for every pair."""
    block = Block(attention=Attention(spelling="matmul", position="relative", mask="added"))
    return Case(Encoder(grid=(3, 4), suffix=1, blocks=(block, block), **changes), keep=0.5)


DISCARD = positions_case(head="tokens")
MERGE = positions_case(head="tokens", seed=1)
ONE_CUT = Case(Encoder(grid=(3, 4), blocks=(Block(Attention(position="relative", mask="added")),)))
ROTARY = Case(
    Encoder(grid=(3, 4), blocks=(Block(attention=Attention(position="rotary")),) * 2), keep=0.5
)
GATED = Case(Encoder(grid=(3, 4), suffix=1, blocks=(Block(),) * 2), also="eventful")


@dataclass(frozen=True)
class Fault:
    """One thing that is done wrong.

    Attributes:
        owner: What holds the function: a module or a class.
        name: Of the function.
        wrong: From the right function to the wrong one.
        case: That shows it.
    """

    owner: Any
    name: str
    wrong: Callable[[Any], Callable[..., Any]]
    case: Case = DISCARD

    def put_in(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(self.owner, self.name, self.wrong(getattr(self.owner, self.name)))


def _tokens_of_the_first_image(right: Any) -> Callable[..., Any]:
    def take(x: Tensor, positions: Tensor) -> Any:
        return right(x, positions[:1].expand_as(positions))

    return take


def _first_rows_of_tables(right: Any) -> Callable[..., Any]:
    def table_rows(self: Conversions, dim: Any, version: int) -> Tensor:
        rows: Tensor = right(self, dim, version)
        return torch.arange(rows.shape[1], device=rows.device).expand_as(rows)

    return table_rows


def _one_token_further(right: Any) -> Callable[..., Any]:
    def patches(self: Stages, x: Tensor, dim: Any) -> Any:
        return right(self, x.roll(1, 1), dim)

    return patches


def _without_masks(right: Any) -> Callable[..., Any]:
    return lambda self, attention, level: None


def _without_key_bias(right: Any) -> Callable[..., Any]:
    return lambda node, attention, bias, layout, dims, args, kwargs: (args, kwargs)


def _into_the_next_one(right: Any) -> Callable[..., Any]:
    def owners(features: Tensor, kept: Tensor) -> Tensor:
        found: Tensor = right(features, kept)
        own = torch.arange(kept.shape[1]).expand_as(kept)
        return ((found + 1) % kept.shape[1]).scatter(1, kept, own)

    return owners


def _plain_mean(right: Any) -> Callable[..., Any]:
    def merge(x: Tensor, sizes: Tensor, owner: Tensor, total: Tensor) -> Any:
        ones = torch.ones_like(sizes)
        return right(x, ones, owner, torch.zeros_like(total).scatter_add(1, owner, ones))

    return merge


def _best_first(right: Any) -> Callable[..., Any]:
    def best(safe: Tensor, scores: Tensor, count: int) -> Tensor:
        kept: Tensor = right(safe, scores, count)
        return kept.flip(1)

    return best


def _wrong_scale(right: Any) -> Callable[..., Any]:
    def received(q: Tensor, k: Tensor, scale: float, bias: Any, mask: Any) -> Any:
        return right(q, k, -scale, bias, mask)

    return received


def _least_attended(right: Any) -> Callable[..., Any]:
    return lambda safe, scores, count: right(safe, -scores, count)


def _restored_in_reverse(right: Any) -> Callable[..., Any]:
    def restore(self: Conversions, x: Tensor, dims: Any, have: int, last: Any) -> Any:
        return right(self, x, dims, have, None if last is None else last.flip(1))

    return restore


def _old_counts(right: Any) -> Callable[..., Any]:
    return lambda self, node, version: {}


def _nothing_written(right: Any) -> Callable[..., Any]:
    def gate(self: IncrementalRun, number: int) -> None:
        table = self.state._tensors
        before = {key: x.clone() for key, x in table.items() if key[1] == "buffer"}
        right(self, number)
        for key, value in before.items():
            if key[0] == number:
                table[key].copy_(value)

    return gate


def _rows_of_the_first_image(right: Any) -> Callable[..., Any]:
    return lambda positions, tokens: right(positions, 0)


def _table_of_the_first_rows(right: Any) -> Callable[..., Any]:
    def meet(self: RowLayout, x: Tensor, own: Any, seen: Any, index: Tensor) -> Any:
        return right(self, x, own, seen, torch.arange(index.shape[0]))

    return meet


def _same_batch_row(right: Any) -> Callable[..., Any]:
    def meet(self: Layout, x: Tensor, own: Any, seen: Any, index: Any) -> Any:
        def first(dim: Any, place: int) -> Tensor:
            rows: Tensor = index(dim, place)
            return rows[:1].expand_as(rows)

        return right(self, x, own, seen, first)

    return meet


TURNED = Case(
    Encoder(grid=(3, 4), prefix=0, blocks=(Block(Attention(position="halves")), Block())),
    also="eventful",
)

FAULTS = {
    "gathers the tokens of another image": Fault(layout, "take", _tokens_of_the_first_image),
    "takes the first rows of a position table": Fault(
        Conversions, "table_rows", _first_rows_of_tables
    ),
    "takes one image's rows of a table for all": Fault(Layout, "meet", _same_batch_row, ROTARY),
    "counts the prefix off by one": Fault(Stages, "_patches", _one_token_further),
    "drops the bias when it ranks": Fault(
        Stages,
        "_mask",
        _without_masks,
        ONE_CUT,
    ),
    "drops the sizes of merged tokens": Fault(prune, "with_key_bias", _without_key_bias, MERGE),
    "merges into the wrong anchor": Fault(stages, "owners", _into_the_next_one, MERGE),
    "merges without weights": Fault(conversions, "merge", _plain_mean, MERGE),
    "does not keep the order of the grid": Fault(stages, "best", _best_first, ONE_CUT),
    "ranks with the wrong scale": Fault(stages, "attention_received", _wrong_scale),
    "keeps the least attended tokens": Fault(stages, "best", _least_attended),
    "puts dropped tokens back in reverse": Fault(Conversions, "restore", _restored_in_reverse),
    "leaves old token counts in reshapes": Fault(Conversions, "literals", _old_counts),
    "does not write what a gate computed": Fault(IncrementalRun, "_gate", _nothing_written, GATED),
    "writes behind a gate for one image only": Fault(
        gate_runs, "rows_of_all", _rows_of_the_first_image, GATED
    ),
    "forgets which rows of a table a gate needs": Fault(
        RowLayout, "meet", _table_of_the_first_rows, TURNED
    ),
}
