"""Wrong input: one line that says what to do, exit code 2, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli import models
from tests.cli.conftest import USER, Run

FILE = models.__file__

WRONG = {
    "explain nonsense": "nonsense is no model: expected one of timm:NAME",
    "explain timm:vit_tiny_patch17": "timm has no such model .there are",
    "explain torchvision:vit_x": "torchvision has no such model",
    "explain transformers:NoSuchModel": "no model class NoSuchModel",
    "explain transformers:ViTModel:none.json": "there is no file none.json",
    "explain none.pt2": "there is no file none.pt2",
    "explain none.py:make": "there is no file none.py",
    f"explain {FILE}:nothing": "has no function nothing",
    f"explain {FILE}:only_model": r"must return a model and its inputs, as \(model, inputs\)",
    f"explain {FILE}:failing": "fails .RuntimeError: no weights here.",
    f"explain {FILE}:wrong_inputs": "does not run on inputs of shape .1, 4, 16, 16.*--input",
    f"explain {FILE}:convolution": "has no attention",
    f"image {FILE}:convolution {FILE}": "is no picture",
    f"explain {USER} --input 3,16": "expected channels,height,width",
    f"explain {USER} --input 3,20,20": "does not run on inputs of shape",
    f"explain {USER} --keep 1.5": "keep=1.5: a float is a share",
    f"explain {USER} --keep many": "--keep many: expected a number",
    f"explain {USER} --method prune": "method='prune': choose one of 'eventful', 'hiprune'",
    f"explain {USER} --set alpha": "--set alpha: expected NAME=VALUE",
    f"explain {USER} --set beta=1": "unknown option 'beta'",
    f"explain {USER} --keep 0.5 --target-flops 0.5": "keep=0.5 and target_flops=0.5 contradict",
    f"explain {USER} --target-flops 0.01": "target_flops=0.01 is out of reach",
    f"explain {USER} --config none.toml": "config='none.toml' cannot be read",
    f"explain {USER} --weights none.pt": "there is no file none.pt",
    f"explain {USER} --weights {FILE}": "holds no weights",
    f"explain {USER} --image PHOTO": "--image .*: pass --html FILE",
    f"explain {USER} --html out.html --image BROKEN": "BROKEN is no picture",
    f"explain {USER} --html out.html --image PHOTO --method eventful": "--image shows which tokens",
    f"explain {USER} --html {FILE}/out.html": "cannot be written",
    f"explain {USER} --colour": "No such option: --colour",
    "explain": "Missing argument",
    "explode": "No such command 'explode'",
    f"image {USER} none.png": "there is no file none.png",
    f"image {USER} EMPTY": "EMPTY holds no pictures",
    f"image {USER} BROKEN": "BROKEN is no picture",
    f"image {USER} PHOTO --keeps 0.5,x": "--keeps x: expected a number",
    f"image {USER} PHOTO --set method=eventful": "image draws pruning",
    f"image {FILE}:convolution PHOTO": "has no attention",
    f"video {USER} none.mp4": "there is no file none.mp4",
    f"video {USER} BROKEN": "BROKEN is no video",
    f"video {USER} 97": "camera 97 cannot be opened",
    f"video {USER} none.mp4 --keep 0.5 --target-ms 5": "--keep 0.5 and --target-ms 5: pass one",
    f"video {FILE}:convolution CLIP": "has no attention",
    f"tune {USER} --data none": "there is no folder none",
    f"tune {USER} --data EMPTY": "EMPTY holds no pictures",
    f"tune {USER} --data EMPTY --method eventful": "EMPTY holds no clips",
    f"tune {USER} --data PHOTOS --labels none.csv": "none.csv cannot be read",
    f"tune {USER} --data PHOTOS --labels BROKEN": "expected columns file,label",
    f"tune {FILE}:convolution --data PHOTOS": "has no attention",
    f"bench {FILE}:convolution": "has no attention",
    f"bench {USER} --rounds 0": "Invalid value for '--rounds'",
    "fuzz": "run this in a checkout",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input(
    run: Run,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    photos: Path,
    clips: Path,
) -> None:
    """Breaks if the error is a traceback, names nothing, or leaves a file behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").write_bytes(b"no picture")
    places = {"PHOTO": photos / "0.png", "PHOTOS": photos, "CLIP": clips / "square.mp4"}
    arguments = [places.get(word, word) for word in line.split()]
    before = sorted(tmp_path.rglob("*"))
    run(*arguments).refused(WRONG[line])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_video_leaves_no_file(run: Run, clips: Path, tmp_path: Path) -> None:
    """Breaks if what was begun before an error stays, or replaces what was there."""
    whole, cut = clips / "square.mp4", tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[:200])
    out = tmp_path / "out.mp4"
    out.write_bytes(b"precious")
    assert run("video", USER, cut, "--out", out, "--set", "inner=eager").code == 2
    assert out.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.mp4", "out.mp4"]


def test_no_budget_is_good_enough(run: Run, photos: Path, tmp_path: Path) -> None:
    """Breaks if a config is written that does not keep its promise."""
    out = tmp_path / "tokenpass.toml"
    ended = run("tune", USER, "--data", photos, "--max-loss", -1, "--keeps", "0.5", "--rounds", 0,
                "--out", out, "--figure", tmp_path / "x.png", "--seeds", 0)  # fmt: skip
    assert ended.code == 1
    assert "every budget loses more than -1 points" in ended.err
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_are_named(run: Run, tmp_path: Path) -> None:
    import torch

    state = models.classifier()[0].state_dict()
    del state["head.bias"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pt")
    ended = run("explain", USER, "--weights", tmp_path / "weights.pt")
    ended.refused(r"tensors 1 missing \(head.bias, ...\), 1 unknown \(extra, ...\)")
