"""Below full budget the compiled model equals one that drops the same tokens by hand.

The hand is :mod:`tests.references`: eager PyTorch that keeps its own books of tokens. Breaks if the
rewrite scores, chooses, merges, weighs, looks up positions, restores or pools any other way.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch

import tokenpass
from tests.references import other_families, timm_families
from tests.references.token_reduction import Family, Reduction, reduced
from tests.zoo import BY_NAME, DEPTH, DIFFERENT, GRID, MODELS, Entry, relative_error, tensors
from tokenpass.methods import CUTS, DEEP_DEPTH, OBJECT_DEPTH

PATCHES = math.prod(GRID)
TOLERANCE = 1e-5
ALPHA = 0.1

FAMILIES: dict[str, Any] = {
    "timm/eva02_tiny_patch14_224": timm_families.Eva,
    "timm/vit_small_patch16_dinov3": timm_families.Eva,
    "timm/beit_base_patch16_224": timm_families.Beit,
    "transformers/CLIPVisionModel": other_families.Clip,
    "transformers/SiglipVisionModel": other_families.Siglip,
    "transformers/ViTModel": other_families.Vit,
    "transformers/Dinov2Model": other_families.Dinov2,
    "torchvision/vit_b_16": other_families.Torchvision,
}

everywhere = pytest.mark.parametrize("entry", MODELS)


def family_of(entry: Entry, model: Any) -> Family:
    family: Family = FAMILIES.get(entry.name, timm_families.Vit)(model)
    return family


def default_cuts(keep: float) -> dict[int, int]:
    """Evenly spaced blocks from the object layer to the deep one, equal shares dropped at each."""
    first, last = (round(DEPTH * share) for share in (OBJECT_DEPTH, DEEP_DEPTH))
    count = min(CUTS, last - first + 1)
    blocks = [math.floor(first + (last - first) * i / max(1, count - 1)) for i in range(count)]
    return {block: round(PATCHES * keep ** (i / count)) for i, block in enumerate(blocks, 1)}


def expected(entry: Entry, model: Any, images: torch.Tensor, **changes: Any) -> Any:
    plan = {
        "cuts": default_cuts(0.5),
        "object_layer": round(DEPTH * OBJECT_DEPTH),
        "alpha": ALPHA,
        "grid": GRID,
        "merges": True,
        "restores": True,
    }
    return reduced(family_of(entry, model), images, Reduction(**{**plan, **changes}))


def assert_equal(entry: Entry, options: dict[str, Any], **changes: Any) -> None:
    """The model compiled with ``options`` equals the reference with ``changes`` to its plan."""
    model, images = entry.build(), entry.images(3)
    fast: Any = torch.compile(model, backend="tokenpass", options={"inner": "eager", **options})
    with torch.no_grad():
        found = tensors(fast(images))
        outputs, positions = expected(entry, model, images, **changes)
    assert tokenpass.report(fast).converted
    assert tokenpass.kept(fast).tolist() == positions.tolist()
    assert relative_error(found, outputs) <= TOLERANCE


@everywhere
def test_the_reference_is_the_model_where_nothing_is_dropped(entry: Entry) -> None:
    model, images = entry.build(), entry.images(3)
    with torch.no_grad():
        outputs, _ = expected(entry, model, images, cuts={2: PATCHES})
        assert relative_error(outputs, tensors(model(images))) <= TOLERANCE


@everywhere
def test_default_schedule(entry: Entry) -> None:
    assert_equal(entry, {"keep": 0.5})


@pytest.mark.parametrize("entry", DIFFERENT)
def test_fewer_tokens_that_leave_nothing_behind(entry: Entry) -> None:
    assert_equal(entry, {"keep": 0.2, "dropped": "discard"}, cuts=default_cuts(0.2), merges=False)


SCHEDULES: dict[str, tuple[dict[str, Any], dict[int, int], int]] = {
    "one cut": ({"stages": ((3, 0.4),), "object_layer": 3}, {3: 26}, 3),
    "anchors long before": ({"stages": ((2, 50), (4, 9)), "object_layer": 1}, {2: 50, 4: 9}, 1),
    "in every block": (
        {"stages": ((1, 0.75), (2, 0.5), (3, 0.25), (4, 1))},
        {1: 48, 2: 32, 3: 16, 4: 1},
        1,
    ),
}


@pytest.mark.parametrize("dropped", ["merge", "discard"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "entry", [BY_NAME["timm/deit_tiny_distilled_patch16_224"], BY_NAME["transformers/Dinov2Model"]]
)
@pytest.mark.slow
def test_other_schedules(entry: Entry, name: str, dropped: str) -> None:
    options, cuts, object_layer = SCHEDULES[name]
    merges = dropped == "merge"
    assert_equal(
        entry,
        {**options, "dropped": dropped, "alpha": 1.0},
        cuts=cuts,
        object_layer=object_layer,
        alpha=1.0,
        merges=merges,
    )


@pytest.mark.parametrize("dropped", ["merge", "discard"])
@pytest.mark.parametrize("name", ["transformers/CLIPVisionModel", "transformers/SiglipVisionModel"])
@pytest.mark.slow
def test_pruned_outputs(name: str, dropped: str) -> None:
    options = {"keep": 0.5, "dropped": dropped, "output": "pruned"}
    merges = dropped == "merge"
    assert_equal(BY_NAME[name], options, merges=merges, restores=False)


@pytest.mark.parametrize("output", [pytest.param("restored", marks=pytest.mark.slow), "pruned"])
@pytest.mark.parametrize("name", ["transformers/CLIPVisionModel", "transformers/ViTModel"])
def test_cut_of_the_output(name: str, output: str) -> None:
    options = {"keep": 0.3, "where": "output", "output": output}
    restores = output == "restored"
    assert_equal(BY_NAME[name], options, cuts={DEPTH: 19}, merges=False, restores=restores)


@pytest.mark.parametrize("output", ["restored", "pruned"])
def test_cut_of_the_output_with_merging(output: str) -> None:
    options = {"keep": 0.3, "where": "output", "dropped": "merge", "output": output}
    restores = output == "restored"
    entry = BY_NAME["transformers/CLIPVisionModel"]
    assert_equal(entry, options, cuts={DEPTH: 19}, merges=True, restores=restores)


@pytest.mark.parametrize("dropped", ["merge", "discard"])
@pytest.mark.parametrize("pool", ["avg", "avgmax"])
@pytest.mark.slow
def test_pooling_over_all_patches(pool: str, dropped: str) -> None:
    def make() -> Any:
        sizes = {"img_size": 128, "depth": DEPTH, "num_classes": 10}
        return timm.create_model("vit_tiny_patch16_224", global_pool=pool, **sizes)

    entry = Entry(f"timm/vit_tiny_patch16_224 {pool}", make, 128, 1)
    assert_equal(entry, {"keep": 0.5, "dropped": dropped}, merges=dropped == "merge")
