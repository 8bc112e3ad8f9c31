"""What must hold of every encoder, whatever it looks like."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tokenpass
from tests.fuzz.encoder import Model, build, images_of
from tests.fuzz.layouts import rows_of, stream_of
from tests.fuzz.masking import Masking, Places
from tests.fuzz.partly import Partly, is_known
from tests.fuzz.parts import Addition, TokenMean
from tests.fuzz.spec import Case, Encoder
from tokenpass.methods import CUTS, DEEP_DEPTH, OBJECT_DEPTH, Budget

ALPHA = 1.0
"""With fewer anchors there would be none among so few tokens."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative to the largest value of an output, or of all gradients."""

MERGED = {torch.float64: 1e-6, torch.float32: 1e-4}
"""The same where tokens were merged, whose numbers and their logarithms are float32."""

GATED = {torch.float64: 1e-5, torch.float32: 1e-4}
"""The same behind gates, where attention is kept up to date in float32."""

AUTOCAST = 4e-2
"""Everywhere under autocast to bfloat16, which has eight bits: either side may be half as far from
the exact numbers."""

UNDECIDED = 1e-5
"""Scores closer than this, relative to the largest, may be ranked either way: they are float32."""

FRAMES: tuple[Budget | None, ...] = (None, 0.5, 1, None)
"""Budgets of the frames of a video; ``None`` is the full one."""


@dataclass(frozen=True)
class Outcome:
    """What was seen.

    Attributes:
        pruned: Whether pruning converted a block.
        gated: Whether gating did; ``None`` if it was not tried.
        compared: Whether the reduced budget was held against the masking executor.
    """

    pruned: bool
    gated: bool | None = None
    compared: bool = False

    @property
    def converted(self) -> bool:
        return self.pruned or bool(self.gated)


class BrokenPropertyError(AssertionError):
    """A property does not hold; the message begins with its name."""


def require(condition: bool, name: str, detail: object = "") -> None:
    if not condition:
        raise BrokenPropertyError(f"{name}: {detail}")


def check(case: Case) -> Outcome:
    """Hold all properties against an encoder.

    Raises:
        BrokenPropertyError: If one does not hold.
    """
    torch._dynamo.reset()
    model, images = build(case.encoder), images_of(case.encoder)
    before = _snapshot(model)
    with _no_failed_pass():
        pruned, compared = _pruning(case, model, images)
        gated = None
        if case.also == "eventful":
            gated = _gating(case.encoder, model)
        else:
            _merging(case, model, images)
    _require_untouched(model, before)
    return Outcome(pruned, gated, compared)


# ---------------------------------------------------------------- pruning


def _pruning(case: Case, model: Model, images: Tensor) -> tuple[bool, bool]:
    fast = compiled(model, tokenpass.HiPrune(keep=1.0, dropped="discard", alpha=ALPHA))
    expected, found = (_with_gradients(function, model, images) for function in (model, fast))
    rounds = case.encoder.rounds
    require_same(found[0], expected[0], "outputs at full budget", rounds=rounds)
    name = "gradients at full budget"
    require_same(found[1], expected[1], name, together=True, rounds=rounds)
    report = tokenpass.report(fast)
    _require_consistent(case, fast, 1.0)
    tokenpass.set_budget(fast, keep=case.keep)
    reduced = leaves(fast(images.clone().requires_grad_()))
    _require_consistent(case, fast, case.keep)
    if not report.converted:
        require_same(reduced, expected[0], "outputs of what was not converted", rounds=rounds)
        return False, False
    return True, _compared(case, model, images, reduced, fast, merges=False)


def _merging(case: Case, model: Model, images: Tensor) -> None:
    fast = compiled(model, tokenpass.HiPrune(keep=1.0, dropped="merge", alpha=ALPHA))
    expected, rounds = leaves(model(images)), case.encoder.rounds
    name = "outputs at full budget, merging"
    require_same(leaves(fast(images)), expected, name, rounds=rounds)
    _require_consistent(case, fast, 1.0)
    tokenpass.set_budget(fast, keep=case.keep)
    reduced = leaves(fast(images))
    _require_consistent(case, fast, case.keep)
    if tokenpass.report(fast).converted:
        _compared(case, model, images, reduced, fast, merges=True)
    else:
        name = "outputs of what was not converted, merging"
        require_same(reduced, expected, name, rounds=rounds)


def _require_consistent(case: Case, fast: Any, keep: Budget) -> None:
    """The report and the statistics say what ran."""
    report, stats = tokenpass.report(fast), tokenpass.stats(fast)
    whole, patches = case.encoder.patches, report.graphs[-1].tokens
    rows = [row for graph in report.graphs for row in graph.blocks]
    graphs = 1 + case.encoder.breaks
    require(len(report.graphs) == graphs, "graphs of the model", len(report.graphs))
    require(len(stats.blocks) == len(rows), "blocks of report and statistics")
    require(len(report.blocks) <= len(case.encoder.blocks), "no more blocks than there are")
    if not rows:
        require(not report.converted, "nothing is converted without a block")
        return
    windows = any(block.attention.window for block in case.encoder.blocks)
    require(patches == whole or windows, "patch tokens", patches)
    wanted = budget_of(keep, patches) if report.converted else patches
    parts = case.encoder.batch * whole // patches
    kept = tokenpass.kept(fast)
    alike = kept.shape[0] == parts or not report.converted
    require(alike and kept.shape[1] == wanted, "tokens kept", tuple(kept.shape))
    left = [row.tokens_out for row in stats.blocks]
    if _maps_between_layers(case.encoder):  # not ours: a layer without a cut has all tokens again
        left = [count for count in left if count != patches]
    counts = [patches, *left]
    require(counts == sorted(counts, reverse=True), "tokens only leave", counts)
    require(counts[-1] == wanted, "tokens after the last block", (counts[-1], wanted))
    saved = report.flops_before - report.flops
    require(report.converted or not saved, "nothing is saved where nothing is converted", saved)


def _maps_between_layers(spec: Encoder) -> bool:
    return spec.layout in ("image", "map") and any(block.built_in for block in spec.blocks)


# ---------------------------------------------------------------- the reduced budget


def budget_of(keep: Budget, patches: int) -> int:
    """Patch tokens that a budget leaves."""
    wanted = round(keep * patches) if isinstance(keep, float) else keep
    return max(1, min(wanted, patches))


def default_cuts(depth: int, patches: int, keep: Budget) -> dict[int, int]:
    """Patch tokens after each block with a cut: equal shares are dropped at each."""
    first, last = (min(depth, max(1, round(depth * d))) for d in (OBJECT_DEPTH, DEEP_DEPTH))
    count = min(CUTS, last - first + 1)
    blocks = [math.floor(first + (last - first) * i / max(1, count - 1)) for i in range(count)]
    share = keep if isinstance(keep, float) else min(1.0, keep / patches)
    counts = [budget_of(share ** (i / count), patches) for i in range(1, count)]
    return dict(zip(blocks, [*counts, budget_of(keep, patches)], strict=True))


def places_in(model: Model, residuals: Sequence[int]) -> Places | None:
    """Where the encoder attends and adds.

    Args:
        model: The encoder.
        residuals: How many additions belong to each block that was found.

    Returns:
        ``None`` where the blocks that were found cannot be told from those that were not.
    """
    spec = model.spec
    blocks = [model.blocks[0] if spec.shared else block for block in model.blocks]
    whole: list[Any] = [block for block in blocks if not block.windowed]
    if any(block.built_in for block in spec.blocks):
        return None
    if len(whole) != len(residuals):
        return None
    begins: dict[nn.Module, list[int | None]] = {model.pool: [None]}
    ends: dict[tuple[nn.Module, int], int] = {}
    for number, (block, count) in enumerate(zip(whole, residuals, strict=True), 1):
        begins.setdefault(block.attention, []).append(number)
        call = number - 1 if spec.shared else 0
        ends[(block.add1, block.add2)[count - 1].out, call] = number
    additions = [module.out for module in model.modules() if isinstance(module, Addition)]
    calls = range(len(blocks) if spec.shared else 1)
    return Places(
        attentions=list(begins.items()),
        additions=[(module, [ends.get((module, call)) for call in calls]) for module in additions],
        means=[module for module in model.modules() if isinstance(module, TokenMean)],
        largest=[model.largest],
        rows=lambda x: rows_of(x, spec.layout),
        stream=lambda rows: stream_of(rows, spec),
        before=spec.before,
        grid=spec.grid,
    )


def _compared(
    case: Case, model: Model, images: Tensor, reduced: list[Tensor], fast: Any, *, merges: bool
) -> bool:
    """Hold a reduced budget against the masking executor; whether that could be done."""
    spec, graph = case.encoder, tokenpass.report(fast).graphs[-1]
    blocks = graph.blocks
    if graph.tokens != spec.patches or len(blocks) < len(spec.blocks) or spec.rounds:
        return False  # under autocast rankings depend on rounding
    if any(block.mlp == "expert choice" for block in spec.blocks):
        return False  # experts choose among all tokens, which come back for them
    cuts = default_cuts(len(blocks), spec.patches, case.keep)
    if any("attention stays on all" in line for line in graph.proof):
        if not is_known(spec, merges=merges):
            return False
        masking: Masking = Partly(model, cuts, ALPHA, merges=merges)
    else:
        places = places_in(model, [len(row.block.residuals) for row in blocks])
        counts = [
            n for row in tokenpass.stats(fast).blocks for n in (row.tokens_in, row.tokens_out)
        ]
        again = counts != sorted(counts, reverse=True)
        if places is None or again:
            return False  # what runs on all tokens again sees those that left
        first = next(iter(cuts))
        masking = Masking(places, cuts, first, ALPHA, len(images), merges=merges)
    expected = leaves(masking.run(model, images))
    wanted = [row.nonzero().flatten().tolist() for row in masking.present]
    kept = tokenpass.kept(fast).tolist()
    how = "merging" if merges else "discarding"
    try:
        require(kept == wanted, f"tokens chosen, {how}", f"{kept}, not {wanted}")
        tolerance = MERGED if merges else TOLERANCE
        name = f"outputs at reduced budget, {how}"
        require_same(reduced, expected, name, tolerance=tolerance)
    except BrokenPropertyError:
        if masking.margin < UNDECIDED:
            return False
        raise
    return True


# ---------------------------------------------------------------- gating


@torch.no_grad()
def _gating(spec: Encoder, model: Model) -> bool:
    fast = compiled(model, tokenpass.Eventful(keep=1.0, scene_cut=None))
    for number, keep in enumerate(FRAMES):
        if number:
            tokenpass.set_budget(fast, keep=1.0 if keep is None else keep)
        frame = images_of(spec, number)
        found, expected = leaves(fast(frame)), leaves(model(frame))
        converted = tokenpass.report(fast).converted
        if keep is None or not converted:
            name = f"outputs of frame {number} at full budget"
            require_same(found, expected, name, tolerance=GATED, rounds=spec.rounds)
        for a, b in zip(found, expected, strict=True):
            require(a.shape == b.shape, "shapes behind gates", (a.shape, b.shape))
            require(bool(a.isfinite().all()), "finite outputs behind gates")
    report, stats = tokenpass.report(fast), tokenpass.stats(fast)
    require(converted == bool(stats.update_rates), "converted means that there are gates")
    require(all(rate == 1.0 for rate in stats.update_rates), "all pass at full budget")
    require(not (converted and stats.computed_in_full), "frames behind gates are not full frames")
    require(len(stats.blocks) == len(report.blocks), "blocks of report and statistics, gating")
    return converted


# ---------------------------------------------------------------- comparing


def compiled(model: nn.Module, method: Any) -> Any:
    backend = tokenpass.backend(method, inner="eager", always_rewrite=True)
    return torch.compile(model, backend=backend, dynamic=False)


def leaves(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    return [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor)]


def _with_gradients(
    function: Any, model: nn.Module, images: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of images and parameters; zeros where there is none."""
    inputs = images.clone().requires_grad_()
    found = leaves(function(inputs))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in found]
    torch.stack([(x * w).sum() for x, w in zip(found, weights, strict=True)]).sum().backward()
    sources = [inputs, *model.parameters()]
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in sources]
    model.zero_grad()
    return [x.detach().clone() for x in found], gradients


def require_same(
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    name: str,
    *,
    together: bool = False,
    tolerance: Mapping[torch.dtype, float] = TOLERANCE,
    rounds: bool = False,
) -> None:
    """Equal up to rounding, in shape and in dtype.

    Args:
        found: By the code under test.
        expected: What it has to be.
        name: Of the property.
        together: Whether the largest value of all, and not of each, is the measure of error.
        tolerance: For each dtype.
        rounds: Whether products are rounded to bfloat16 on the way.
    """
    require(len(found) == len(expected), name, f"{len(found)} tensors, not {len(expected)}")
    largest = max((float(b.abs().max()) for b in expected if b.numel()), default=0.0)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        shapes = f"output {number}: {tuple(a.shape)}, not {tuple(b.shape)}"
        require(a.shape == b.shape, name, shapes)
        require(a.dtype == b.dtype, name, f"output {number}: {a.dtype}, not {b.dtype}")
        if not b.numel():
            continue
        scale = max(largest if together else float(b.detach().abs().max()), 1e-12)
        error = float((a.detach().double() - b.detach().double()).abs().max()) / scale
        allowed = AUTOCAST if rounds else tolerance[b.dtype]
        require(error <= allowed, name, f"output {number} is off by {error:.1e}")


@contextmanager
def _no_failed_pass() -> Iterator[None]:
    """A rewrite that failed and was undone is a failure here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*failed", tokenpass.TokenpassWarning)
        yield


def _snapshot(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {key: value.clone() for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]
        state[f"of {name}"] = (module.training, sum(hooks), "forward" in vars(module))
    return state


def _require_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = _snapshot(model)
    require(after.keys() == before.keys(), "the model is as it was")
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        require(same, "the model is as it was", key)
