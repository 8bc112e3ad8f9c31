"""Predicted times: what a graph asks of a machine, and how the machine is remembered.

Breaks if operations are lost or counted twice between the two sorts, if a rewritten graph is
predicted from the tokens of the original, or if another machine's constants are used.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tokenpass
from tests import tiny
from tokenpass.calibration import Calibration, Load, calibrated, machine_name

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENPASS_CACHE", str(tmp_path))
    return tmp_path


DEPTH, SIDE, IMAGES = 6, 32, 2
TOKENS = (SIDE // tiny.PATCH) ** 2 + 1
"""With the class token."""


class WrittenOut(tiny.Attention):
    """Attention as two products around a softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores: Tensor = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return scores.softmax(-1) @ v


def explained(keep: float, attention: tiny.Part = tiny.Attention) -> tokenpass.Report:
    blocks = [tiny.Block(attention) for _ in range(DEPTH)]
    images = tiny.images(IMAGES, SIDE)
    return tokenpass.explain(
        tiny.Encoder(blocks, side=SIDE), images, method=tokenpass.HiPrune(keep=keep)
    )


def loads(report: tokenpass.Report) -> tuple[Load, Load]:
    (graph,) = report.graphs
    assert graph.load is not None
    assert graph.load_before is not None
    return graph.load_before, graph.load


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_operations_add_up_to_the_cost(keep: float) -> None:
    report = explained(keep)
    before, after = loads(report)
    assert before.linear + before.attention == report.flops_before
    assert after.linear + after.attention == report.flops


@pytest.mark.slow
@pytest.mark.parametrize("attention", [tiny.Attention, WrittenOut])
def test_attention_s_operations_are_those_of_its_two_products(attention: tiny.Part) -> None:
    """Breaks if only the fused operator counts as attention, or a linear layer does."""
    before, after = loads(explained(1.0, attention))
    assert before.attention == DEPTH * IMAGES * 2 * 2 * TOKENS**2 * tiny.WIDTH
    assert after == before


def test_fewer_tokens_write_fewer_bytes() -> None:
    before, after = loads(explained(0.5))
    assert after.bytes < before.bytes
    assert after.linear < before.linear
    assert after.attention > 0


def test_no_prediction_without_calibration() -> None:
    report = explained(0.5)
    assert report.predicted_ms is None
    assert "predicted" not in str(report)


def test_prediction_is_the_sum_over_what_is_asked(cache: Path) -> None:
    found = tokenpass.calibrate()
    assert min(found.linear, found.attention, found.byte) > 0
    assert len(list(cache.iterdir())) == 1
    report = explained(0.5)
    before, after = loads(report)
    for load, predicted in ((before, report.predicted_ms_before), (after, report.predicted_ms)):
        expected = load.linear * found.linear + load.attention * found.attention
        expected += load.bytes * found.byte
        assert predicted == pytest.approx(1e3 * expected)
    assert "predicted: " in str(report)
    assert max(len(line) for line in str(report).splitlines()) <= 100


def test_another_machine_s_constants_are_not_used(cache: Path) -> None:
    tokenpass.calibrate()
    assert isinstance(calibrated(CPU), Calibration)
    (path,) = cache.iterdir()
    path.write_text(path.read_text().replace(machine_name(CPU), "another"))
    assert calibrated(CPU) is None
    path.write_text("{")
    assert calibrated(CPU) is None
    threads = torch.get_num_threads()
    tokenpass.calibrate()
    torch.set_num_threads(threads + 1)
    try:
        assert calibrated(CPU) is None
    finally:
        torch.set_num_threads(threads)


def test_gated_graphs_predict_nothing() -> None:
    """Their costs are of frames, which the constants say nothing about."""
    tokenpass.calibrate()
    report = tokenpass.explain(tiny.encoder(), tiny.images(1), method=tokenpass.Eventful())
    assert report.converted
    assert report.predicted_ms is None
