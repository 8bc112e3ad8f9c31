"""The demo's model is the one whose weights it reads, and its picture says what was kept.

Breaks if a weight of the ONNX file lands in another place or stays transposed, if the model in
plain PyTorch differs from the reference, or if nothing is drawn.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tokenpass
from examples import demo, picture, saliency
from tokenpass.cli.pictures import as_input

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
WEIGHTS = ASSETS / "dinov2_vits14_saliency.pt"
HEIGHT, WIDTH = 56, 70
DEPTH = 4
GRID = (HEIGHT // saliency.PATCH, WIDTH // saliency.PATCH)

needs_assets = pytest.mark.skipif(not WEIGHTS.exists(), reason=f"{WEIGHTS.name} is not here")


@pytest.fixture(scope="module")
def shipped() -> saliency.State:
    """The weights as the demo reads them from the package."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    try:
        return saliency.read_onnx(saliency.weights_path())
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def recorded() -> saliency.State:
    """The weights as they were recorded, in float16."""
    parts = torch.load(WEIGHTS, weights_only=True)
    return {f"{part}.{name}": x for part in parts for name, x in parts[part].items()}


def images() -> Tensor:
    return torch.randn(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def untrained() -> saliency.Saliency:
    """The first blocks of the model, with random weights."""
    model = saliency.Saliency().eval()
    model.vit.blocks = model.vit.blocks[:DEPTH]
    return model


def reference() -> tuple[Any, Any]:
    """Encoder and decoder of the independent module that lies beside the weights."""
    spec = importlib.util.spec_from_file_location("reference", ASSETS / "reference_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    encoder, decoder = module.load_dinov2_small(WEIGHTS)
    return encoder, decoder


@needs_assets
def test_onnx_weights_equal_the_recorded_ones(
    shipped: saliency.State, recorded: saliency.State
) -> None:
    assert shipped.keys() == recorded.keys()
    for name, expected in recorded.items():
        assert torch.equal(shipped[name].half(), expected), name


@needs_assets
def test_model_equals_the_reference(shipped: saliency.State) -> None:
    model = saliency.build({name: x.half().float() for name, x in shipped.items()})
    encoder, decoder = reference()
    with torch.no_grad():
        expected = decoder(encoder(images())[:, 1:], *GRID, (HEIGHT, WIDTH))
        assert float((model(images()) - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize("dropped", ["merge", "discard"])
def test_full_budget_equals_the_model(dropped: str) -> None:
    model = untrained()
    options: dict[str, Any] = {"keep": 1.0, "always_rewrite": True, "inner": "eager"}
    fast = torch.compile(model, backend="tokenpass", options={**options, "dropped": dropped})
    with torch.no_grad():
        found, expected = fast(images()), model(images())
    assert tokenpass.report(fast).converted
    assert float((found - expected).abs().max()) <= 1e-5


@pytest.mark.slow
def test_demo_prunes_and_answers() -> None:
    model = untrained()
    fast = torch.compile(model, backend="tokenpass", options={"inner": "eager"})
    with torch.no_grad():
        found = demo.answers(model, fast, images())
        expected = model(images())[0, 0]
    assert torch.equal(found.full, expected)
    assert found.pruned.shape == (HEIGHT, WIDTH)
    assert not torch.equal(found.pruned, expected)
    assert len(found.kept) == round(tokenpass.HiPrune().keep * GRID[0] * GRID[1])


def test_weights_that_do_not_fit_are_named() -> None:
    fewer = saliency.Saliency().state_dict()
    del fewer["vit.blocks.3.fc1.bias"]
    with pytest.raises(ValueError, match=r"missing \['vit\.blocks\.3\.fc1\.bias'\]"):
        saliency.build(fewer)


def test_photograph_is_cut_to_its_middle_square(tmp_path: Path) -> None:
    pixels = np.zeros((28, 56, 3), dtype=np.uint8)
    pixels[:, 14:42, 1] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    photo = demo.photograph(tmp_path / "wide.png", 28)
    assert photo.shape == (28, 28, 3)
    assert photo[..., 1].min() == 1.0
    mean, std = saliency.MEAN[1], saliency.STD[1]
    green = as_input(photo, saliency.MEAN, saliency.STD)[0, 1]
    assert green.mean().item() == pytest.approx((1 - mean) / std, abs=1e-6)


def test_the_picture_is_written(tmp_path: Path) -> None:
    photo, flat = np.ones((4, 6, 3), dtype=np.float32), torch.zeros(4, 6)
    picture.draw(tmp_path / "demo.png", photo, torch.tensor([1, 5]), (2, 3), flat, flat)
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > image.height
