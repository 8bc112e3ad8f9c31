"""An independent executor for encoders that lose tokens in their token-wise parts only.

It runs the original model, eagerly and on all tokens, attention included. Once a token has left,
nothing is added to it any more (discarded), or what is added to the token that it went into
(merged). Which tokens leave is decided here, by their distance from the mean token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.encoder import Model
from tests.fuzz.layouts import rows_of, stream_of
from tests.fuzz.masking import Masking, Places
from tests.fuzz.spec import Encoder
from tests.references.rule import safe_positions

MLPS = ("gelu", "relu", "gated", "joint gate", "none")
"""Those that are token-wise from end to end."""


class Partly(Masking):
    """Runs a model of which tokens leave the token-wise parts.

    In a graph of one block that gets its tokens from another they keep their own values there.

    Args:
        model: A generated encoder that :func:`is_known` knows.
        cuts: ``{block: patch tokens behind its first addition}``; the last is the budget.
        alpha: Share of the budget for anchors and buffers.
        merges: Whether a token that leaves goes into the most similar one that stays.
    """

    def __init__(
        self, model: Model, cuts: Mapping[int, int], alpha: float, *, merges: bool
    ) -> None:
        spec = model.spec
        told = spec.breaks and spec.patch > 1  # a pixel may be anything along an axis of the input
        self.apart = told and len(spec.blocks) == 1
        places = Places(
            attentions=[],
            additions=[],
            means=[],
            largest=[],
            rows=lambda x: rows_of(x, spec.layout),
            stream=lambda rows: stream_of(rows, spec),
            before=spec.before,
            grid=spec.grid,
        )
        super().__init__(places, dict(cuts), next(iter(cuts)), alpha, spec.batch, merges=merges)

    def run(self, model: nn.Module, *inputs: Any) -> Any:
        """What the model computes with fewer tokens."""
        assert isinstance(model, Model)
        hooks = []
        for number, block in enumerate(model.blocks, 1):
            for addition in (block.add1, block.add2):
                assert isinstance(addition, nn.Module)
                hooks.append(addition.register_forward_pre_hook(self._withholds))
            assert isinstance(block.add1, nn.Module)
            hooks.append(block.add1.register_forward_hook(self._cuts(number)))
        try:
            return model(*inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def _withholds(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> Any:
        """The branch as tokens that left get it."""
        x, branch = args
        if self.frozen is None:
            return None
        rows, patches = self.rows_of(branch)
        if self.merges:
            patches[:] = patches.gather(1, self.owner[..., None].expand_as(patches))
        else:
            patches[:] = patches * self.present[..., None]
        return x, self.places.stream(rows)

    def _cuts(self, number: int) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
            if number not in self.cuts:
                return None
            rows, patches = self.rows_of(out)
            self.frozen = patches.clone()
            self.received = self._distances(self.frozen)
            if not self.safe:
                budget = list(self.cuts.values())[-1]
                scores = self.received.tolist()
                self.safe = [
                    safe_positions(s, self.places.grid, budget, self.alpha) for s in scores
                ]
            self._cut(self.cuts[number], self.frozen)
            if self.merges and not self.apart:
                patches[:] = self.frozen
            return self.places.stream(rows)

        return hook

    def _distances(self, patches: Tensor) -> Tensor:
        """Of each patch token from the mean of those that are left, ``(B, N)``."""
        wide = patches.detach().float()
        weights = self.present.float()[..., None]
        mean = (wide * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        distances: Tensor = torch.linalg.vector_norm(wide - mean, dim=2).double()
        for row, present in zip(distances, self.present, strict=True):
            self._note_margin(row[present].tolist())
        return distances


def is_known(spec: Encoder, *, merges: bool) -> bool:
    """Whether the executor says what the rewrite computes.

    It gives to the tokens that left what it adds to others. The rewrite does so with all that is
    computed behind a linear layer: the same only where that is added to the stream and nothing
    else, and where positions do not tell the queries of two merged tokens apart.
    """
    turned = ("rotary", "halves", "computed")
    return not (
        spec.shared
        or spec.rounds
        or spec.extra == "branch"
        or spec.embed not in ("convolution", "overlapping", "stem")
        or any(
            block.built_in
            or block.local
            or block.detour != "none"
            or block.placement not in ("pre", "post", "sandwich")
            or block.mlp not in MLPS
            or (merges and block.attention.position in turned)
            for block in spec.blocks
        )
    )
