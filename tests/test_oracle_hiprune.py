"""Selections that the published code made, recorded once with its inputs.

The compatible rules equal every one of them. The strict rule is the published one with these
corrections alone: neighbours stay on the grid, anchors and buffers never exceed the budget and are
never chosen twice, each image has a budget of its own, and of equal scores the first wins. Breaks
if a quirk is lost from the compatible rules or comes back into the strict one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import tokenpass
from tests import recorded_clip
from tests.recorded_clip import DATA, recorded
from tests.references.published import published
from tests.zoo import relative_error
from tokenpass import HiPrune, OptionError

LLAVA_GRID = (24, 24)
MERGE = 2
"""Patches along each side of a token of Qwen2.5-VL."""

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no recorded selections at {DATA}")


def each(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", recorded(name), ids=lambda case: str(case["name"]))


def tensors_of(name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(DATA / f"{name}.safetensors")
    return found


@pytest.fixture(scope="module")
def llava() -> dict[str, Tensor]:
    return tensors_of("llava")


@pytest.fixture(scope="module")
def qwen() -> dict[str, Tensor]:
    return tensors_of("qwen")


@pytest.fixture(scope="module")
def clip() -> dict[str, Tensor]:
    return tensors_of("clip_tiny")


def positions(mask: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


# ---------------------------------------------------------------- LLaVA


def llava_scores(case: dict[str, Any], data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return data[f"{case['inputs']}.shallow"], data[f"{case['inputs']}.deep"]


def llava_selection(case: dict[str, Any], data: dict[str, Tensor]) -> list[list[int]]:
    lists = [sorted({*image["local"], *image["register"]}) for image in case["images"]]
    mask = data.get(f"{case['name']}.mask")
    assert mask is None or positions(mask) == lists
    return lists


@each("llava")
def test_llava_as_published(case: dict[str, Any], llava: dict[str, Tensor]) -> None:
    method = HiPrune(
        keep=case["retention"], alpha=float(case["alpha"]), where="output", compat="llava"
    )
    scores = llava_scores(case, llava)
    before = [x.clone() for x in scores]
    if "error" in case:
        with pytest.raises(OptionError, match="budget of"):
            tokenpass.select(method, *scores, LLAVA_GRID)
    else:
        found = tokenpass.select(method, *scores, LLAVA_GRID)
        assert found.tolist() == llava_selection(case, llava)
    assert all(map(torch.equal, scores, before))


@each("llava")
def test_llava_strict(case: dict[str, Any], llava: dict[str, Tensor]) -> None:
    scores = llava_scores(case, llava)
    images = None if "error" in case else llava_selection(case, llava)
    shared = case["retention"] // case["batch"]
    check_published(case, scores, LLAVA_GRID, shared, images)
    check_strict(case, scores, LLAVA_GRID, min(case["retention"], 576))


def test_llava_from_whole_maps(llava: dict[str, Tensor]) -> None:
    maps = tensors_of("llava_fullmap")
    first, deep = (maps[name].mean((1, 2))[:, 1:] for name in ("shallow", "deep"))
    method = HiPrune(keep=128, alpha=0.5, where="output", compat="llava")
    found = tokenpass.select(method, first, deep, LLAVA_GRID)
    assert found.tolist() == positions(maps["mask"])


# ---------------------------------------------------------------- Qwen2.5-VL


def qwen_scores(case: dict[str, Any], data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return data[f"{case['inputs']}.shallow"][None], data[f"{case['inputs']}.deep"][None]


def qwen_grid(case: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the first image; the published code lays packed images out in its rows."""
    _, height, width = case["grid_thw"][0]
    return height // MERGE, width // MERGE


@each("qwen")
def test_qwen_as_published(case: dict[str, Any], qwen: dict[str, Tensor]) -> None:
    method = HiPrune(keep=case["retention"], alpha=case["alpha"], where="output", compat="qwen")
    scores, grid = qwen_scores(case, qwen), qwen_grid(case)
    if "error" in case:
        with pytest.raises(OptionError, match="budget of"):
            tokenpass.select(method, *scores, grid)
        return
    found = tokenpass.select(method, *scores, grid)
    assert found.tolist() == [sorted({*case["local"], *case["register"]})]
    assert found.shape[1] == case["selected"]
    mask = qwen.get(f"{case['name']}.mask")
    assert mask is None or found.tolist() == positions(mask[None])


@each("qwen")
def test_qwen_strict(case: dict[str, Any], qwen: dict[str, Tensor]) -> None:
    first, deep = qwen_scores(case, qwen)
    tokens = [height * width // MERGE**2 for _, height, width in case["grid_thw"]]
    images = None if "error" in case else [sorted({*case["local"], *case["register"]})]
    budget = round(sum(tokens) * case["retention"])
    check_published(case, (first, deep), qwen_grid(case), budget, images)
    parts = zip(first.split(tokens, 1), deep.split(tokens, 1), strict=True)
    for scores, (_, height, width) in zip(parts, case["grid_thw"], strict=True):
        grid = height // MERGE, width // MERGE
        check_strict(case, scores, grid, round(scores[0].shape[1] * case["retention"]))


def test_packed_images_have_no_common_grid(qwen: dict[str, Tensor]) -> None:
    with pytest.raises(OptionError, match="98"):
        tokenpass.select(HiPrune(), qwen["qpack.shallow"][None], qwen["qpack.deep"][None], (6, 8))


def test_qwen_from_whole_maps() -> None:
    maps = tensors_of("qwen_fullmap")
    scores = []
    for name in ("shallow", "deep"):
        cells = maps[name].mean(0).sum(0).reshape(-1, MERGE**2).mean(1)
        scores.append(cells[maps["reverse_indices"]][None])
    method = HiPrune(keep=0.334, alpha=0.5, where="output", compat="qwen")
    found = tokenpass.select(method, scores[0], scores[1], (6, 8))
    assert found.tolist() == positions(maps["mask"][None])


# ---------------------------------------------------------------- strict against published


def in_plain_python(
    scores: tuple[Tensor, Tensor],
    grid: tuple[int, int],
    budget: int,
    alpha: float,
    *,
    corrected: bool,
) -> list[list[int]]:
    rows = zip(scores[0].tolist(), scores[1].tolist(), strict=True)
    return [
        published(first, deep, grid, budget, alpha, corrected=corrected) for first, deep in rows
    ]


def check_published(
    case: dict[str, Any],
    scores: tuple[Tensor, Tensor],
    grid: tuple[int, int],
    budget: int,
    images: list[list[int]] | None,
) -> None:
    """The published rule in plain Python, quirks and all, is the one that was recorded."""
    if "ties" in case["name"]:
        return  # the recorded choice among equal scores is an accident of torch.topk
    if images is None:
        with pytest.raises(ValueError, match="registers"):
            in_plain_python(scores, grid, budget, case["alpha"], corrected=False)
        return
    assert in_plain_python(scores, grid, budget, case["alpha"], corrected=False) == images


def check_strict(
    case: dict[str, Any], scores: tuple[Tensor, Tensor], grid: tuple[int, int], budget: int
) -> None:
    """The strict rule is the published one with its quirks corrected, and nothing else."""
    found = tokenpass.select(HiPrune(keep=budget, alpha=float(case["alpha"])), *scores, grid)
    wanted = in_plain_python(scores, grid, budget, case["alpha"], corrected=True)
    assert found.tolist() == wanted


# ---------------------------------------------------------------- whole vision towers


class Tower(nn.Module):
    """The hidden states that a vision-language model reads from a CLIP encoder."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        super().__init__()
        self.encoder = transformers.CLIPVisionModel(recorded_clip.config()).eval()
        self.encoder.load_state_dict(recorded_clip.weights(data))

    def forward(self, pixels: Tensor) -> Tensor:
        states = self.encoder(pixels, output_hidden_states=True).hidden_states
        return states[SELECT_LAYER]  # type: ignore[no-any-return]


SELECT_LAYER = -2
DEEP_LAYER = 7
"""The block, counted from 1, whose output is ``hidden_states[-2]`` of eight blocks."""


@pytest.mark.slow
@each("clip")
def test_compiled_tower(case: dict[str, Any], clip: dict[str, Tensor]) -> None:
    batch = f"b{case['images'][1] - case['images'][0]}"
    first, deep = (clip[f"att_{batch}.{n - 1}"] for n in (case["object_layer"], DEEP_LAYER))
    layers = {"object_layer": case["object_layer"], "deep_layer": DEEP_LAYER}
    method = HiPrune(
        keep=case["retention"],
        alpha=float(case["alpha"]),
        where="output",
        compat="llava",
        **layers,
    )
    if "error" in case:
        with pytest.raises(OptionError, match="budget of"):
            tokenpass.select(method, first, deep, LLAVA_GRID)
        return
    wanted = positions(clip[f"{case['name']}.mask"])
    assert tokenpass.select(method, first, deep, LLAVA_GRID).tolist() == wanted
    fast: Any = torch.compile(Tower(clip), backend=tokenpass.backend(method, inner="eager"))
    with torch.no_grad():
        found = fast(recorded_clip.pixels(case, clip))
    assert tokenpass.kept(fast).tolist() == wanted
    features = clip[f"features_{batch}"]
    expected = torch.stack([row[kept] for row, kept in zip(features, wanted, strict=True)])
    assert relative_error(found[:, 1:], expected) <= 1e-5
