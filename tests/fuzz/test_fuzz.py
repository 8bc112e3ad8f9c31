"""Generated encoders keep every property: the bounded, derandomised part of ``make fuzz``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fuzz.encoder import build, images_of
from tests.fuzz.grammar import DEPTHS
from tests.fuzz.masking import Masking
from tests.fuzz.properties import ALPHA, places_in
from tests.fuzz.run import drawn, fuzz
from tests.fuzz.spec import Attention, Block, Case, Encoder, changed, simpler

SECONDS = 75.0
"""At most, with one more case: the whole file stays under two minutes on a slow core."""

CASES = 25

CONVERTED = 0.5
"""Share of so few encoders with a converted block; less, and the grammar has degenerated."""


@pytest.mark.slow
def test_generated_encoders(tmp_path: Path) -> None:
    """Breaks if a pass is wrong, crashes, or undoes itself; the file that it names says where."""
    tally = fuzz(SECONDS, 0, tmp_path, most=CASES, shrinking=0.0)
    found = {error: path.read_text() for error, path in tally.failures.items()}
    assert not found, "\n\n".join(found.values())
    assert tally.counts["converted"] >= CONVERTED * tally.cases
    assert tally.counts["compared"] >= 0.3 * tally.counts["pruned"]


def test_a_seed_draws_the_same_cases() -> None:
    """Breaks if a failure could not be drawn again."""
    first = drawn(3, 10)
    assert first == drawn(3, 10)
    assert first != drawn(4, 10)
    assert {len(case.encoder.blocks) for case in drawn(5, 40)} == set(DEPTHS)


def test_a_case_is_printed_as_the_code_that_makes_it() -> None:
    """Breaks if a regression file would hold another case."""
    names = {"Case": Case, "Encoder": Encoder, "Block": Block, "Attention": Attention}
    for case in drawn(7, 20):
        assert eval(str(case), names) == case


def test_simpler_specs_come_to_an_end() -> None:
    """Breaks if the simplifier could go round in circles."""
    for case in drawn(8, 5):
        spec, steps = case.encoder, 0
        while (plainer := next(simpler(spec), None)) is not None:
            spec, steps = plainer, steps + 1
            assert steps < 200
        assert changed(spec) == f"Encoder(blocks=(Block(),), seed={spec.seed})".replace(
            ", seed=0", ""
        )


@torch.no_grad()
def test_the_executor_is_the_model_where_nothing_is_masked() -> None:
    """Breaks if the executor that the rewrite is held against computes something else."""
    for number, case in enumerate(drawn(9, 12)):
        spec = case.encoder
        model, images = build(spec), images_of(spec)
        whole = [block for block in model.blocks if not block.windowed]
        places = places_in(model, [1] * len(whole))
        if places is None or not whole:
            continue
        masking = Masking(places, {1: spec.patches}, 1, ALPHA, len(images), merges=number % 2 == 0)
        for a, b in zip(
            torch.utils._pytree.tree_leaves(masking.run(model, images)),
            torch.utils._pytree.tree_leaves(model(images)),
            strict=True,
        ):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
