"""Models in all forms, photographs, clips, and the command line itself."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli import models
from tokenpass.cli import main
from tokenpass.cli.clips import writing

USER = f"{models.__file__}:classifier"
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
PHOTOS, FRAMES = 4, 4
KINDS = ("user", "exported", "timm", "transformers")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)

    def refused(self, words: str) -> None:
        """Breaks if an error is not one line, has a traceback, or does not say ``words``."""
        assert self.code == 2, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert re.search(words, lines[0]), lines[0]


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line."""

    def running(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main([str(item) for item in arguments])
        return Ended(code, *capsys.readouterr())

    return running


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's classifier as an exported program."""
    path = tmp_path_factory.mktemp("exported") / "classifier.pt2"
    model, images = models.classifier()
    torch.export.save(torch.export.export(model, (images,)), path)
    return path


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes of a small model of transformers."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(params=KINDS)
def named(request: pytest.FixtureRequest, exported: Path, config: Path) -> list[str]:
    """Each form of a model, with the options that make it small."""
    forms = {
        "user": [USER],
        "exported": [str(exported)],
        "timm": ["timm:test_vit", "--input", "3,64,64", "--weights", "random"],
        "transformers": [f"transformers:ViTModel:{config}", "--weights", "random"],
    }
    return forms[request.param]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of noise, with the classes that the user's model gives them."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(PHOTOS):
        pixels = generator.integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def labels(photos: Path) -> Path:
    path = photos.parent / f"{photos.name}.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("file", "label"))
        rows.writerows((photo.name, n % models.CLASSES) for n, photo in enumerate(photos.iterdir()))
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip: a bright square that moves over noise."""
    folder = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(1).integers(0, 120, (64, 96, 3), np.uint8)
    with writing(folder / "square.mp4", 10) as writer:
        for number in range(FRAMES):
            frame = noise.copy()
            frame[16:32, 8 * number : 8 * number + 16] = 255
            writer.write(frame)
    return folder
