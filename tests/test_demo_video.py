"""The video demo reads and writes what it says, and its picture says what was updated.

Breaks if frames are lost or reordered between reading and writing, or drawn as others are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenpass
from benchmarks import clips
from examples import demo_video
from examples.saliency import MEAN, STD, Saliency
from tokenpass.cli.clips import writing

SIZE = (56, 84)
LEVELS = (20, 90, 160, 230)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A video of plain grey frames, each brighter than the one before."""
    path = tmp_path / "grey.mp4"
    with writing(path, 12.5) as writer:
        for level in LEVELS:
            writer.write(np.full((*SIZE, 3), level, np.uint8))
    return path


def levels(found: Any) -> list[int]:
    return [round(float(np.mean(picture))) for picture in found]


def test_frames_survive_writing_and_reading(clip: Path) -> None:
    assert levels(clips.pictures(clip)) == pytest.approx(LEVELS, abs=3)
    assert clips.frame_rate(clip) == 12.5
    (picture,) = clips.pictures(clip, limit=1, start=2, size=(28, 14))
    assert picture.shape == (28, 14, 3)
    assert levels([picture]) == pytest.approx(LEVELS[2:3], abs=3)


def test_frames_are_normalised(clip: Path) -> None:
    frame, *_ = clips.frames(clip)
    assert frame.shape == (1, 3, clips.HEIGHT, clips.WIDTH)
    expected = [(LEVELS[0] / 255 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    assert frame.mean((0, 2, 3)).tolist() == pytest.approx(expected, abs=0.06)


def test_a_clip_runs_back_and_forth() -> None:
    call = clips.successive(float, [torch.tensor(float(index)) for index in range(3)])
    assert [call() for _ in range(7)] == [0, 1, 2, 1, 0, 1, 2]


def test_heat_is_brighter_for_more() -> None:
    drawn = demo_video.heat(torch.tensor([[0.0, 0.5, 1.0]])).astype(int).sum(-1)
    assert drawn.shape == (1, 3)
    assert drawn[0, 0] < drawn[0, 1] < drawn[0, 2]


def test_packaged_clip() -> None:
    try:
        path = demo_video.packaged_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    first, second = clips.pictures(path, limit=2)
    assert first.std() > 10
    assert not np.array_equal(first, second)


@pytest.mark.slow
def test_demo_gates_and_draws(tmp_path: Path) -> None:
    model = Saliency().eval()
    model.vit.blocks = model.vit.blocks[:1]
    options: dict[str, Any] = {"method": "eventful", "keep": 0.25, "inner": "eager"}
    options["always_rewrite"] = True
    fast = torch.compile(model, backend="tokenpass", options=options)
    first = np.random.default_rng(0).integers(0, 255, (clips.HEIGHT, clips.WIDTH, 3), np.uint8)
    second = first.copy()
    second[:14, :14] = 0
    with torch.no_grad():
        video = [first, second, second]
        found = demo_video.watch(model, fast, video, tmp_path / "demo.mp4", 10)
    assert tokenpass.report(fast).converted
    assert found.errors[0] <= 1e-5
    assert found.updated == pytest.approx([1, 0.25, 0.25])
    assert found.flops[0] >= found.dense_flops > found.flops[1] == found.flops[2]
    written = list(clips.pictures(tmp_path / "demo.mp4", size=(clips.HEIGHT, 2 * clips.WIDTH)))
    assert len(written) == 3
    bright = written[0][:, : clips.WIDTH].mean() - written[1][:, : clips.WIDTH].mean()
    assert bright > 10
