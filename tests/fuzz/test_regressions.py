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
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    """Breaks as it did when the case was found."""
    check(CASES[name])
