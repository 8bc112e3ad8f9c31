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
            blocks=(
                Block(
                    attention=Attention(heads=4, spelling="baddbmm", key_heads=2),
                    norms="none",
                    placement="one sum",
                ),
            ),
            final_norm=False,
            head="class",
            double=False,
        ),
        also="eventful",
    ),
    "one head of a stream of one row, which looks like the stream": Case(
        Encoder(
            grid=(1, 8),
            layout="image",
            blocks=(Block(), Block(attention=Attention(heads=1))),
            extra="branch",
        ),
        keep=0.75,
    ),
    "a stream that is returned under another name, and written into": Case(
        Encoder(
            grid=(1, 8),
            layout="image",
            blocks=(Block(), Block(residual="in place")),
            extra="branch",
        ),
        keep=0.75,
    ),
    "a slice of all tokens that were split and put together, behind a gate": Case(
        Encoder(
            blocks=(
                Block(
                    attention=Attention(position="halves"),
                    detour="split",
                ),
            ),
            prefix=0,
        ),
        also="eventful",
    ),
    "a stream of one row that lost its tokens as tokens": Case(
        Encoder(
            grid=(1, 8),
            layout="map",
            blocks=(
                Block(norms="written out", built_in=True),
                Block(attention=Attention(heads=4, spelling="bmm", join="cat"), norms="none"),
            ),
            head="sum",
            extra="branch",
        ),
        keep=0.5,
    ),
    "images behind an operation that nobody understands": Case(
        Encoder(
            layout="map",
            blocks=(
                Block(mlp="expert choice"),
                Block(
                    attention=Attention(heads_mixed=True, join="permute"),
                    placement="sandwich",
                    mlp="none",
                    detour="padded",
                ),
            ),
            final_norm=False,
            head="mean of all",
            dead=True,
            double=False,
            seed=863,
        ),
        keep=0.25,
        also="eventful",
    ),
    "one token of a stream right behind a cut that merges": Case(
        Encoder(prefix=0, blocks=(Block(),), final_norm=False, head="pair"), keep=0.5, also="merge"
    ),
    "experts that take two tokens, behind a gate": Case(
        Encoder(
            grid=(2, 2),
            blocks=(Block(mlp="expert choice", detour="flipped"),),
            final_norm=False,
            extra="dictionary",
            batch=1,
            seed=284,
        ),
        keep=0.75,
        also="eventful",
    ),
    "keys that are masked, of which there are more than queries": Case(
        Encoder(
            blocks=(
                Block(),
                Block(
                    attention=Attention(
                        bias=False,
                        scale="key",
                        norm="unit",
                        position="relative",
                        mask="keys",
                        join="contiguous view",
                    ),
                    norms="root mean square",
                    placement="sandwich",
                    residual="weighted skip",
                    detour="rolled",
                ),
            ),
            final_norm=False,
            head="pair",
            extra="view",
            batch=3,
            seed=556,
        ),
        keep=0.5,
        also="merge",
    ),
    "images that are mixed with heads": Case(
        Encoder(
            layout="image",
            blocks=(
                Block(mlp="joint gate", residual="alpha", detour="float64"),
                Block(
                    attention=Attention(
                        heads=4,
                        spelling="baddbmm",
                        projections="heads outside",
                        key_heads=2,
                        position="rotary",
                        mask="causal",
                        join="permute",
                    ),
                    norms="written out",
                    placement="one sum",
                    detour="stacked",
                ),
            ),
            final_norm=False,
            head="attention",
            extra="branch",
            batch=3,
            seed=141,
        ),
        keep=3,
        also="eventful",
    ),
    "a built-in layer that adds in half precision": Case(
        Encoder(blocks=(Block(built_in=True),), double=False, autocast=True), also="eventful"
    ),
    "an image between built-in blocks, each with a cut": Case(
        Encoder(layout="image", blocks=(Block(built_in=True),) * 3, shared=True, seed=738),
        keep=0.25,
        also="eventful",
    ),
    "a batch that stays apart where heads are grouped": Case(
        Encoder(
            patch=1,
            embed="reshape",
            blocks=(
                Block(
                    attention=Attention(heads=4, spelling="baddbmm", key_heads=2),
                    placement="post",
                    mlp="expert choice",
                    residual="addcmul",
                ),
            ),
            head="attention",
            extra="hidden",
            batch=3,
            seed=60,
        ),
        keep=0.25,
        also="eventful",
    ),
    "a token that has seen only tokens that leave, and leaves": Case(
        Encoder(
            grid=(3, 4),
            prefix=0,
            blocks=(
                Block(attention=Attention(key_heads=2), norms="written out", mlp="gated"),
                Block(
                    attention=Attention(
                        spelling="keys first",
                        projections="separate",
                        key_heads=2,
                        scale="key",
                        position="relative",
                        mask="causal",
                        heads_mixed=True,
                        window=True,
                    ),
                    mlp="none",
                    residual="reversed",
                ),
            ),
            head="pair",
            extra="branch",
            double=False,
            batch=3,
            seed=541,
        ),
        keep=0.25,
    ),
    "a table of rows that count as images, one for the whole batch": Case(
        Encoder(
            patch=1,
            embed="reshape",
            blocks=(
                Block(
                    attention=Attention(norm="unit", position="computed", window=True),
                    norms="none",
                ),
            ),
            batch=3,
        ),
        keep=0.25,
        also="eventful",
    ),
    "rounding that goes one way here and the other way there": Case(
        Encoder(
            grid=(4, 4),
            width=4,
            blocks=(
                Block(
                    attention=Attention(
                        heads=4,
                        spelling="keys first",
                        key_heads=2,
                        position="rotary",
                        join="cat",
                    ),
                    norms="written out",
                    placement="sandwich",
                    residual="in place",
                    detour="flipped",
                ),
                Block(
                    attention=Attention(
                        heads=4, spelling="weights", heads_mixed=True, join="contiguous view"
                    ),
                    placement="parallel",
                    mlp="relu",
                ),
            ),
            final_norm=False,
            head="class",
            double=False,
            autocast=True,
            seed=999,
        ),
        also="eventful",
    ),
    "one block in another graph than its patch embedding": Case(Encoder(broken=True)),
    "blocks in another graph than their patch embedding": Case(
        Encoder(broken=True, prefix=2, suffix=1, blocks=(Block(), Block(built_in=True))),
    ),
    "a stream whose dimensions change places": Case(
        Encoder(layout="channels first", blocks=(Block(), Block(built_in=True)), final_norm=False),
        keep=0.75,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    """Breaks as it did when the case was found."""
    check(CASES[name])
