"""Encoders in which fuzzing found something wrong, as plain as they get."""

from __future__ import annotations

import pytest

from tests.fuzz.properties import check
from tests.fuzz.spec import Attention, Block, Case, Encoder

CASES = {
    "a register read alone after the patch tokens": Case(
        Encoder(
            suffix=1,
            blocks=(Block(attention=Attention(position="computed"), detour="flat"),),
            final_norm=False,
            head="mean",
            batch=1,
        ),
        keep=0.25,
    ),
    "a linear layer that nobody reads, behind a gate": Case(
        Encoder(blocks=(Block(),), dead=True), also="eventful"
    ),
    "a slice of all tokens, behind a gate with more rows than an image has tokens": Case(
        Encoder(prefix=0, blocks=(Block(attention=Attention(position="halves")),), batch=3),
        also="eventful",
    ),
    "flattened batch and heads that come from different slices": Case(
        Encoder(
            blocks=(Block(), Block(attention=Attention(spelling="baddbmm", projections="chunks")))
        ),
        keep=0.25,
    ),
    "an empty slice of a token axis": Case(Encoder(blocks=(Block(detour="grid"),))),
    "a merged stream that is returned as it is": Case(
        Encoder(blocks=(Block(),), final_norm=False), keep=0.25, also="merge"
    ),
    "scores of queries that autocast leaves wide": Case(
        Encoder(blocks=(Block(attention=Attention(norm="unit")),), double=False, autocast=True),
        keep=3,
        also="merge",
    ),
    "a bias of each query beside a mask of the keys": Case(
        Encoder(blocks=(Block(), Block(attention=Attention(position="distance", mask="keys")))),
        keep=3,
    ),
    "a masked attention of all tokens that ranks those that are left": Case(
        Encoder(blocks=(Block(attention=Attention(mask="boolean"), detour="grid"),) * 2), keep=0.75
    ),
    "sixteen rows and a convolution that asks for as many, behind a gate": Case(
        Encoder(
            patch=1,
            embed="stem",
            prefix=2,
            suffix=2,
            table_over="all",
            blocks=(
                Block(
                    attention=Attention(
                        spelling="keys first",
                        projections="separate",
                        scale="divided",
                        join="contiguous view",
                    ),
                    norms="root mean square",
                    residual="scaled",
                    detour="grid",
                ),
                Block(
                    attention=Attention(
                        heads=4,
                        spelling="baddbmm",
                        projections="views",
                        key_heads=2,
                        bias=False,
                        scale="both",
                        norm="unit",
                        position="halves",
                        join="contiguous view",
                    ),
                    norms="none",
                    placement="one sum",
                ),
            ),
            final_norm=False,
            head="class",
            double=False,
        ),
        keep=0.75,
        also="eventful",
    ),
    "a stream whose dimensions change places": Case(
        Encoder(layout="channels first", blocks=(Block(), Block(built_in=True)), final_norm=False),
        keep=0.75,
    ),
    "a second cut behind a block that needs all tokens": Case(
        Encoder(prefix=2, blocks=(Block(detour="split"),) * 3), keep=0.75, also="merge"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    """Breaks as it did when the case was found."""
    check(CASES[name])
