"""Video streams through the published Eventful code, recorded once with weights and frames.

The compiled encoder selects the same tokens at every gate, gives the same outputs and costs the
same operations. Where recorded tokens tie, its own choice is held to the rule, and everything
after it to a plain implementation (`tests/eventful_reference.py`) that makes the same choice.
Breaks if a gate measures against the wrong frame, if a buffer loses a row, or if the delta form of
attention updates in another order. That plain implementation is itself held to every recorded run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenpass
from tests import eventful_reference
from tests.eventful_encoder import OracleBlock, OracleEncoder, Shape
from tests.eventful_reference import Case, Reference
from tokenpass import Eventful

CASES = eventful_reference.recorded()
TOLERANCE = 5e-5
DOUBLE = 1e-10
"""Allowed difference of outputs between two evaluations in float64."""
NEAR = 1e-4
"""Errors that differ by less may change places between two evaluations in float32."""
FORM: dict[str, Any] = {"tokenwise": "none", "matmul1": "scores", "full": "delta"}
"""Of attention, in which a published class computes it."""
COUNTED = ("linear", "matmul", "gate", "accumulator")
DENSE_COUNTED = ("linear", "gate")
"""Where scores are computed anew and not buffered."""

pytestmark = pytest.mark.skipif(not CASES, reason=f"no recorded runs at {eventful_reference.DATA}")

DENSE = [case for case in CASES if case.kind == "dense"]
KINDS = (
    "base_tokenwise_topk16",
    "preln_full_topk16",
    "relpos_full_topk16",
    "win4_full_topk16",
    "batch2_full_topk16",
    "base_matmul1_topk16",
    "pool2_matmul1_topk16",
)
EVENTFUL = [case for case in CASES if case.kind != "dense"]
each_dense, each_eventful, each_double, each_kind = (
    pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)
    for chosen in (
        DENSE,
        EVENTFUL,
        [case for case in EVENTFUL if "out_f64" in case.raw["tensors"]],
        [case for case in EVENTFUL if case.name in KINDS],
    )
)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def check_rule(case: Case, errors: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Masks ``(B, N)`` choose what the policy would by errors ``(B, N)``, near ties aside."""
    for gate, error in errors.items():
        chosen = masks[gate]
        least = torch.where(chosen, error, torch.inf).amin(1)
        most = torch.where(chosen, 0, error).amax(1)
        if "threshold" in case.policy:
            assert float(least.min()) > case.policy["threshold"] - NEAR, gate
            assert float(most.max()) <= case.policy["threshold"] + NEAR, gate
            continue
        tokens = error.shape[1]
        k = case.policy.get("k") or int(case.policy["fraction"] * tokens)
        assert chosen.sum(1).tolist() == [k] * len(chosen), gate
        assert bool((least >= most - NEAR).all()), gate


def check_masks(found: dict[str, Tensor], expected: dict[str, Tensor], frame: int) -> None:
    for gate, mask in expected.items():
        assert torch.equal(found[gate], mask), f"frame {frame}, {gate}"


# ---------------------------------------------------------------- the plain implementation


@each_dense
def test_dense_encoder(case: Case) -> None:
    encoder, expected = case.encoder(), case.tensors["out"]
    with torch.no_grad():
        for frame, x in enumerate(case.frames):
            assert distance(encoder(x), expected[frame]) <= TOLERANCE
        if "out_f64" in case.tensors:
            found = encoder.double()(case.frames[5].double())
            assert distance(found, case.tensors["out_f64"][5]) <= DOUBLE


@each_eventful
def test_plain_implementation(case: Case) -> None:
    reference = Reference.of(case)
    for frame, x in enumerate(case.frames):
        masks = case.masks(frame)
        found = reference.step(x, masks if frame in case.ties else None)
        assert distance(found, case.tensors["out"][frame]) <= TOLERANCE
        check_masks(reference.selected, masks, frame)
        check_rule(case, reference.errors, masks)
        assert dict(reference.counts) == case.counts(frame)
        for gate, error in reference.errors.items():
            assert distance(error, case.tensors[f"norm.{gate}"][frame - 1]) <= NEAR


@each_double
def test_plain_implementation_in_float64(case: Case) -> None:
    reference = Reference.of(case)
    reference.encoder.double()
    for frame, x in enumerate(case.frames):
        found = reference.step(x.double(), case.masks(frame) if frame in case.ties else None)
        assert distance(found, case.tensors["out_f64"][frame]) <= DOUBLE


def test_padded_windows() -> None:
    """Breaks if padding changes which tokens share a window, or what padding tokens are."""
    shape = Shape(8, 2, 1, (5, 6), 16, window=(4, 4), windowed=frozenset((0,)))
    block = OracleBlock(shape, windowed=True)
    qkv = torch.randn(2, 30, 24)
    grid = qkv.unflatten(1, (5, 6))
    with torch.no_grad():
        found = block.attention(qkv).unflatten(1, (5, 6))
        corner = block.qkv.bias.expand(2, 4, 4, 24).clone()
        corner[:, :1, :2] = grid[:, 4:, 4:]
        q, k, v = block.heads(corner.flatten(1, 2))
        alone = block.weights(q, block.scores(q, k)) @ v
    expected = alone.transpose(1, 2).reshape(2, 4, 4, 8)[:, :1, :2]
    assert distance(found[:, 4:, 4:], expected) <= 1e-6


def test_class_token_competes() -> None:
    """Breaks if a fraction leaves the class token out, or one gate shares another's choice."""
    encoder = OracleEncoder(Shape(8, 2, 2, (2, 3), 16, class_token=True)).eval()
    reference = Reference(encoder, "full", {"fraction": 0.3})
    frames = torch.randn(3, 1, 7, 8)
    reference.step(frames[0])
    reference.step(frames[1])
    assert {int(mask.sum()) for mask in reference.selected.values()} == {2}
    reference.reset()
    with torch.no_grad():
        assert distance(reference.step(frames[2]), encoder(frames[2])) <= 1e-6
    assert not reference.errors


# ---------------------------------------------------------------- the compiled encoder


class FromImages(nn.Module):
    """An encoder whose tokens are the pixels of images ``(B, D, H, W)``."""

    def __init__(self, encoder: OracleEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.encoder(images.flatten(2).transpose(1, 2))
        return out


def compiled(case: Case, model: nn.Module, attention: Any = None) -> Any:
    """A model of a case's encoder, compiled with gates that behave as published.

    Args:
        case: A recorded run.
        model: That reads what the test gives it.
        attention: Form of attention; that of the case if ``None``.
    """
    policy = case.policy
    name = {"k": "keep", "fraction": "keep", "threshold": "threshold"}
    budget: dict[str, Any] = {name[key]: policy[key] for key in name if key in policy}
    method = Eventful(
        **budget,
        attention=attention or FORM[case.kind],
        norm=policy.get("order", 2),
        gate_before_norm=case.before_norm,
        compat=True,
    )
    backend = tokenpass.backend(method, inner="eager", always_rewrite=True)
    return torch.compile(model, backend=backend)


def last_masks(case: Case, fast: Any) -> dict[str, Tensor]:
    """What each gate chose in the last frame: ``(B, N)`` bool."""
    return dict(zip(case.gates(), tokenpass.stats(fast).selected, strict=True))


def check_counts(fast: Any, expected: dict[str, int], names: Iterable[str]) -> None:
    found = tokenpass.stats(fast).operations
    for name in names:
        assert found.get(name, 0) == expected.get(name, 0), name


@torch.no_grad()
def check_stream(case: Case, fast: Any, inputs: Iterable[Tensor], names: Iterable[str]) -> None:
    """Run a compiled model through the frames, against the record and the plain implementation.

    Args:
        case: A recorded run.
        fast: The compiled model.
        inputs: What it reads, frame by frame.
        names: Operations that have to be as many as recorded.
    """
    reference = Reference.of(case)
    # The full block's outputs depend on which of the tied tokens were chosen, from then on.
    recorded = min(case.ties, default=len(case.frames)) if case.kind == "full" else len(case.frames)
    for frame, (x, tokens) in enumerate(zip(inputs, case.frames, strict=True)):
        found, masks = fast(x), last_masks(case, fast)
        assert distance(found, reference.step(tokens, masks)) <= TOLERANCE, f"frame {frame}"
        check_rule(case, reference.errors, masks)
        check_counts(fast, reference.counts, names)
        if frame < recorded:
            assert distance(found, case.tensors["out"][frame]) <= TOLERANCE, f"frame {frame}"
            check_counts(fast, case.counts(frame), names)
        if frame < recorded and frame not in case.ties:
            check_masks(masks, case.masks(frame), frame)
    check_reset(case, fast, x, tokens)
    check_counts(fast, case.counts(0), names)


def check_reset(case: Case, fast: Any, x: Tensor, tokens: Tensor) -> None:
    """After a reset a frame is computed in full, whatever came before."""
    tokenpass.reset(fast)
    assert distance(fast(x), case.encoder()(tokens)) <= TOLERANCE
    assert all(bool(mask.all()) for mask in last_masks(case, fast).values())


@pytest.mark.slow
@each_eventful
def test_compiled(case: Case) -> None:
    check_stream(case, compiled(case, case.encoder()), case.frames, COUNTED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in EVENTFUL if case.kind == "matmul1"], ids=lambda case: case.name
)
def test_compiled_with_dense_attention(case: Case) -> None:
    """Buffered scores change no value: the same with fused attention, which has more products."""
    fast = compiled(case, case.encoder(), "none")
    check_stream(case, fast, case.frames, DENSE_COUNTED)


@pytest.mark.slow
@each_kind
def test_compiled_from_images(case: Case) -> None:
    """Breaks if gates need to know, or must not know, where the tokens come from."""
    images = case.frames.transpose(2, 3).unflatten(3, case.raw["config"]["grid"]).contiguous()
    check_stream(case, compiled(case, FromImages(case.encoder())), images, COUNTED)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("policy", [{"k": 16}, {"threshold": 2.0}, {"k": 64}], ids=str)
@pytest.mark.parametrize("published", ["EventfulMatmul1Block", "EventfulBlock"])
def test_pooled_keys(published: str, policy: dict[str, Any]) -> None:
    """Two videos in a batch, of other classes and policies than recorded, against the plain
    implementation. Breaks if a key that several changed tokens are pooled into is counted twice,
    or if one video's fillers put back what another token of their cell has changed."""
    (recorded,) = (case for case in CASES if case.name == "pool2_matmul1_topk16")
    config = {**recorded.raw["config"], "block_class": published}
    case = Case({**recorded.raw, "config": config, "policy": policy})
    check_as_plain(case, torch.cat((case.frames, case.frames.flip(0).roll(5, 2)), 1))


@pytest.mark.slow
@torch.no_grad()
def test_product_in_half_precision() -> None:
    """Breaks if what the delta form remembers of the product has another precision than it."""
    (recorded,) = (case for case in CASES if case.name == "base_full_topk16")
    config = {**recorded.raw["config"], "block_extra": {"matmul_2_cast": "bfloat16"}}
    case = Case({**recorded.raw, "config": config})
    # Later, tokens tie: the choice depends on the last bit of what is remembered.
    check_as_plain(case, case.frames[:9])


def check_as_plain(case: Case, frames: Tensor) -> None:
    """Run a case that was not recorded, against the plain implementation alone."""
    reference, fast = Reference.of(case), compiled(case, case.encoder())
    for x in frames:
        found, masks = fast(x), last_masks(case, fast)
        assert distance(found, reference.step(x, masks)) <= TOLERANCE
        check_rule(case, reference.errors, masks)
        check_counts(fast, reference.counts, COUNTED)
