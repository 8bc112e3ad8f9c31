"""Every command on every form of a model."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenpass
from tests.cli import models
from tests.cli.conftest import FRAMES, KINDS, PHOTOS, USER, Run
from tokenpass.cli.clips import pictures
from tokenpass.cli.curve import read_labels
from tokenpass.cli.models import load
from tokenpass.cli.pictures import input_of, read
from tokenpass.cli.video import STRIP

COMMANDS = ("explain", "image", "video", "tune", "bench", "fuzz", "doctor")
EAGER = ("--set", "inner=eager", "--set", "always_rewrite=True")

every_form = pytest.mark.parametrize(
    "named",
    [pytest.param(k, marks=[] if k == "user" else pytest.mark.slow) for k in KINDS],
    indirect=True,
)
"""All forms; the quick loop takes one."""


def test_explain_shows_what_the_report_says(run: Run, named: list[str]) -> None:
    """Breaks if a form is loaded as another model, or numbers are lost on the way."""
    ended = run("explain", *named, "--keep", 0.5, "--json", "--set", "alpha=0.2")
    assert ended.code == 0, ended.err
    found = ended.data
    assert found["converted"]
    assert found["kept"] == round(0.5 * found["tokens"])
    assert found["flops"] < found["flops_before"]
    assert found["method"].startswith("HiPrune(keep=0.5, alpha=0.2")
    assert found["blocks"][0]["tokens_in"] == found["tokens"]
    assert run("explain", *named, "--keep", 0.5).code == 0


@pytest.mark.slow
def test_explain_equals_the_api(run: Run) -> None:
    """Breaks if the command explains another model, method or input."""
    model, images = models.classifier()
    for name, method in (("hiprune", tokenpass.HiPrune()), ("eventful", tokenpass.Eventful())):
        with torch.no_grad():
            expected = tokenpass.explain(model, images, method=method)
        found = run("explain", USER, "--method", name, "--json").data
        assert (found["flops"], found["flops_before"]) == (expected.flops, expected.flops_before)
    ended = run("explain", USER)
    assert ended.out.splitlines()[0] == str(tokenpass.explain(model, images)).splitlines()[0]


@pytest.mark.slow
def test_explain_by_a_share_of_the_flops(run: Run) -> None:
    """Breaks if the budget is not the one solved for."""
    found = run("explain", USER, "--target-flops", 0.85, "--json").data
    assert found["flops"] <= 0.85 * found["flops_before"]
    more = run("explain", USER, "--keep", found["kept"] + 1, "--json").data
    assert more["flops"] > 0.85 * more["flops_before"]


def test_explain_says_no(run: Run) -> None:
    """Breaks if a model that is left as it is looks like success to a script."""
    ended = run("explain", USER, "--keep", "1.0")
    assert ended.code == 1
    assert "left as it is" in ended.out


def test_inputs_by_name(run: Run) -> None:
    """Breaks if inputs of a dictionary do not reach the model by their names."""
    assert run("explain", USER.replace(":classifier", ":by_name"), "--json").data["converted"]


@pytest.mark.slow
@pytest.mark.parametrize("named", ["user", "timm"], indirect=True)
def test_explain_writes_a_page(run: Run, named: list[str], photos: Path, tmp_path: Path) -> None:
    """Breaks if the page is of another report, or shows other tokens than the model keeps."""
    page, photo = tmp_path / "out.html", photos / "1.png"
    given = ["explain", *named, "--keep", 0.5, "--html", page]
    assert run(*given).code == 0
    assert "<table" in (plain := page.read_text(encoding="utf-8"))
    assert "data:image" not in plain
    ended = run(*given, "--image", photo, "--json")
    assert ended.code == 0, ended.err
    assert ended.data["kept"] == round(0.5 * ended.data["tokens"])
    written = page.read_text(encoding="utf-8")
    assert re.search(r"(src|href)=.https?:", written) is None
    found = re.search(r'<script id="data"[^>]*>(.*?)</script>', written)
    assert found is not None
    shown = {c["keep"]: c["positions"] for c in json.loads(found[1])["choices"]}

    asked = dict(zip(named[1::2], named[2::2], strict=True))
    loaded = load(named[0], asked.get("--input"), asked.get("--weights"))
    backend = tokenpass.backend(tokenpass.HiPrune(keep=0.3), inner="eager", always_rewrite=True)
    fast = torch.compile(loaded.model, backend=backend)
    with torch.inference_mode():
        loaded.call(fast, input_of(loaded, read(photo, *loaded.images.shape[2:])))
    assert shown[0.3] == tokenpass.kept(fast)[0].tolist()


@pytest.mark.slow
@every_form
def test_image_draws_pictures(run: Run, named: list[str], photos: Path, tmp_path: Path) -> None:
    """Breaks if a picture is missing, or the table says other tokens than the model kept."""
    chosen = [photos / "0.png", photos / "1.png"]
    ended = run("image", named[0], *chosen, *named[1:], "--out", tmp_path, "--keeps", "0.5,0.25",
                "--set", "always_rewrite=True", "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    rows = ended.data["rows"]
    assert [row["keep"] for row in rows] == 2 * [0.36, 0.5, 0.25]
    for row in rows:
        assert row["kept"][-1] == round(row["keep"] * row["tokens"])
        assert 0 <= row["agreement"] <= 1
    names = sorted(path.name for path in tmp_path.iterdir())
    kinds = ("cuts", "keeps", "merged")
    assert names == sorted(f"{number}-{kind}.png" for number in (0, 1) for kind in kinds)
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.width >= 600


@pytest.mark.slow
@every_form
def test_video_writes_every_frame(run: Run, named: list[str], clips: Path, tmp_path: Path) -> None:
    """Breaks if frames are lost, are of another size, or the numbers are of other frames."""
    out, figure = tmp_path / "out.mp4", tmp_path / "time.png"
    ended = run("video", named[0], clips / "square.mp4", *named[1:], "--out", out, "--keep", 0.25,
                "--figure", figure, *EAGER, "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    found = ended.data
    assert found["frames"] == len(found["milliseconds"]) == FRAMES
    assert found["in_full"] >= 1
    assert found["keeps"] == FRAMES * [0.25]
    frames = list(pictures(out))
    assert len(frames) == FRAMES
    assert {frame.shape for frame in frames} == {(448 + STRIP, 448, 3)}
    with Image.open(figure) as image:
        assert image.width == 600


@pytest.mark.slow
def test_programs_for_a_fixed_number_of_pictures(run: Run, photos: Path, tmp_path: Path) -> None:
    """Breaks if other numbers of pictures reach a program that was exported for three."""
    model, images = models.classifier()
    path, out = tmp_path / "three.pt2", tmp_path / "tokenpass.toml"
    torch.export.save(torch.export.export(model, (images.expand(3, -1, -1, -1),)), path)
    ended = run("tune", path, "--data", photos, "--max-loss", 100, "--keeps", "0.5", "--rounds", 0,
                "--out", out, "--figure", tmp_path / "figure.png", *EAGER, "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.data["images"] == 3
    assert "the last 1 are left out" in ended.err
    picture = next(photos.iterdir())
    run("image", path, picture, "--out", tmp_path).refused("takes 3 pictures at a time")


@pytest.mark.slow
@every_form
def test_tune_writes_what_it_measured(
    run: Run, named: list[str], photos: Path, tmp_path: Path
) -> None:
    """Breaks if the config names another budget than the cheapest one within the loss."""
    out, figure = tmp_path / "tokenpass.toml", tmp_path / "tokenpass.png"
    ended = run("tune", named[0], *named[1:], "--data", photos, "--max-loss", 100, "--keeps",
                "0.5,0.25", "--rounds", 1, "--batch", 2, "--out", out, "--figure", figure, *EAGER,
                "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    found = ended.data
    assert found["images"] == PHOTOS
    assert found["chosen"] == min(found["rows"], key=lambda row: row["flops"])["keep"] == 0.25
    written = tomllib.loads(out.read_text())
    assert written["options"]["keep"] == 0.25
    assert written["measured"] == found["rows"]
    assert all(row["ms"] > 0 for row in found["rows"])
    with Image.open(figure) as image:
        assert image.width == 600
    if named[0] == USER:
        model, images = models.classifier()
        config: Any = str(out)
        fast = torch.compile(model, backend="tokenpass", options=config)
        with torch.no_grad():
            fast(images)
        stats = tokenpass.stats(fast)
        assert stats.flops / stats.flops_before == pytest.approx(
            found["rows"][1]["flops"], abs=1e-4
        )


@pytest.mark.slow
@every_form
def test_bench_times_every_budget(run: Run, named: list[str]) -> None:
    """Breaks if a variant is missing, or FLOPs are those of another budget."""
    ended = run("bench", named[0], *named[1:], "--keeps", "0.5,0.25", "--rounds", 2, *EAGER,
                "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    rows = ended.data["rows"]
    assert [row["of_flops"] < 1 for row in rows] == [False, False, True, True]
    assert rows[3]["of_flops"] < rows[2]["of_flops"]
    assert all(row["median_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_bench_of_gates(run: Run) -> None:
    """Breaks if frames behind gates are timed that are computed in full."""
    ended = run("bench", USER, "--method", "eventful", "--keeps", "0.25", "--rounds", 1, *EAGER,
                "--set", "scene_cut=None", "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.data["rows"][2]["of_flops"] < 1


@pytest.mark.slow
def test_tune_counts_right_classes(run: Run, photos: Path, labels: Path, tmp_path: Path) -> None:
    """Breaks if a photograph is scored with another one's label."""
    ended = run("tune", USER, "--data", photos, "--labels", labels, "--max-loss", 100, "--keeps",
                "1.0", "--rounds", 0, "--seeds", 0, "--out", tmp_path / "x.toml", "--figure",
                tmp_path / "x.png", "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    loaded = load(USER, None, None)
    wanted = read_labels(labels, [])
    right = []
    for path in sorted(photos.iterdir()):
        pixels = input_of(loaded, read(path, models.SIDE, models.SIDE))
        with torch.no_grad():
            right.append(int(loaded.model(pixels).argmax()) == wanted[path.name])
    (row,) = ended.data["rows"]
    assert row["score"] == 100 * sum(right) / PHOTOS
    assert row["loss"] == 0
    assert row["random_loss"] is None


@pytest.mark.slow
def test_tune_on_clips(run: Run, clips: Path, tmp_path: Path) -> None:
    """Breaks if first frames, which are computed in full, are scored."""
    ended = run("tune", USER, "--data", clips, "--method", "eventful", "--max-loss", 100,
                "--keeps", "0.5,0.25", "--rounds", 1, "--out", tmp_path / "x.toml", "--figure",
                tmp_path / "x.png", *EAGER, "--set", "scene_cut=None", "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    found = ended.data
    assert found["images"] == FRAMES - 1
    assert found["rows"][1]["flops"] < found["rows"][0]["flops"] < 1
    written = tomllib.loads((tmp_path / "x.toml").read_text())["options"]
    assert written["method"] == "eventful"
    assert written["keep"] == 0.25


@pytest.mark.slow
def test_video_holds_a_time(run: Run, clips: Path, tmp_path: Path) -> None:
    """Breaks if the budget is not steered: so short a time makes it fall."""
    ended = run("video", USER, clips / "square.mp4", "--target-ms", 0.01, "--out",
                tmp_path / "x.mp4", *EAGER, "--json")  # fmt: skip
    keeps = ended.data["keeps"]
    assert keeps[-1] < keeps[0]


@pytest.mark.slow
def test_fuzz_runs_the_fuzzer(run: Run, tmp_path: Path) -> None:
    ended = run("fuzz", "--seconds", 60, "--cases", 1, "--failures", tmp_path, "--json")
    assert ended.code == 0, ended.err
    assert ended.data["cases"] == 1
    assert not ended.data["failures"]


@pytest.mark.inductor
def test_doctor(run: Run) -> None:
    """Breaks if something that works here is said not to."""
    ended = run("doctor", "--json")
    assert ended.code == 0, ended.out
    assert {item["name"] for item in ended.data if item["good"]} >= {
        "pruning, eager",
        "gating, eager",
        "pruning, Inductor",
    }


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    """Breaks if help is wider or longer than a terminal, or an option has no words."""
    monkeypatch.setenv("COLUMNS", str(columns))
    ended = run(*command.split(), "--help")
    assert ended.code == 0
    lines = ended.out.rstrip().splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) <= 48
    assert command in ended.out


def test_version(run: Run) -> None:
    assert run("--version").out == f"tokenpass {tokenpass.__version__}\n"
    assert "Usage" in run().out


@pytest.mark.parametrize("columns", [80, 120])
def test_results_fit_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Breaks if a table is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    ended = run("explain", USER)
    assert max(map(len, ended.out.splitlines())) <= columns
