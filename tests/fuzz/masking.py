"""An independent executor that drops tokens by masking.

It runs the original model, eagerly and on all tokens. A token that was dropped is hidden as a key
(its probability is set to zero and the others are rescaled: a score of minus infinity), and its
rows are ignored: wherever the residual stream is added to, they go back to what they were when the
token left. Which tokens leave is decided here, by :mod:`tests.references.rule` on the probabilities
that the executor sees.

Where tokens are merged, the rows of one that left are those of the token that it went into, which
weighs as a key what the tokens weigh that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.masking import FUSED, SOFTMAX, scores_of
from tests.references.rule import safe_positions, survivors


@dataclass(frozen=True)
class Places:
    """Where an encoder attends, adds and averages.

    Attributes:
        attentions: Of all patch tokens, each with the numbers of the blocks that it begins, call by
            call, counted from 1; ``None``: it only reads tokens, and ranks none.
        additions: Results of the residual additions, each with the numbers of the blocks that end
            there, or ``None``.
        means: Over tokens, which stay as a dimension of one.
        largest: Of tokens, which go.
        rows: The stream as tokens ``(B, L, C)``; ``stream`` is the inverse.
        before: Tokens before the patch tokens.
        grid: Rows and columns of patch tokens.
    """

    attentions: Sequence[tuple[nn.Module, Sequence[int | None]]]
    additions: Sequence[tuple[nn.Module, Sequence[int | None]]]
    means: Sequence[nn.Module]
    largest: Sequence[nn.Module]
    rows: Callable[[Tensor], Tensor]
    stream: Callable[[Tensor], Tensor]
    before: int
    grid: tuple[int, int]


class Masking(TorchDispatchMode):
    """Runs a model with fewer and fewer tokens.

    Args:
        places: In the model.
        cuts: ``{block: patch tokens after it}``; the last is the budget.
        object_block: Whose attention finds anchors.
        alpha: Share of the budget for anchors and buffers.
        images: How many.
        merges: Whether a token that leaves goes into the most similar one that stays.

    Attributes:
        present: Which patch tokens are left, ``(B, N)``, bool.
        margin: How close the closest decision was, relative to the largest score.
    """

    def __init__(
        self,
        places: Places,
        cuts: dict[int, int],
        object_block: int,
        alpha: float,
        images: int,
        *,
        merges: bool = False,
    ) -> None:
        super().__init__()
        self.places, self.cuts = places, cuts
        self.object_block, self.alpha = object_block, alpha
        self.count = math.prod(places.grid)
        self.present = torch.ones(images, self.count, dtype=torch.bool)
        self.sizes = torch.ones(images, self.count, dtype=torch.float64)
        self.owner = torch.arange(self.count).repeat(images, 1)
        self.merges = merges
        self.margin = math.inf
        self.safe: list[set[int]] = []
        self.frozen: Tensor | None = None
        self.received: Tensor | None = None
        self.block: int | None = None
        self.attending = False

    def run(self, model: nn.Module, *inputs: Any) -> Any:
        """What the model computes with fewer tokens."""
        hooks = []
        for module, numbers in self.places.attentions:
            hooks.append(module.register_forward_pre_hook(self._begins(iter(numbers))))
            hooks.append(module.register_forward_hook(self._ends))
        for module, numbers in self.places.additions:
            hooks.append(module.register_forward_hook(self._adds(iter(numbers))))
        hooks += [module.register_forward_hook(self._averages) for module in self.places.means]
        hooks += [module.register_forward_hook(self._largest) for module in self.places.largest]
        try:
            with self:
                return model(*inputs)
        finally:
            for hook in hooks:
                hook.remove()

    # ------------------------------------------------------------ the residual stream

    def _adds(self, numbers: Iterator[int | None]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            number = next(numbers)
            rows, patches = self.rows_of(out)
            if self.frozen is not None:
                patches[:] = self._ignoring_the_gone(patches)
            if number is not None and number in self.cuts:
                self.frozen = patches.clone()
                self._cut(self.cuts[number], self.frozen)
                if self.merges:
                    patches[:] = self.frozen
            stream = self.places.stream(rows)
            with torch.no_grad():
                out.copy_(stream)  # what was added in place has this name, too
            return stream

        return hook

    def rows_of(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of a stream as rows ``(B, N, C)``, and a view of those of the patch tokens."""
        rows = self.places.rows(stream).clone()
        return rows, rows[:, self.places.before :][:, : self.count]

    def _ignoring_the_gone(self, patches: Tensor) -> Tensor:
        """``patches`` ``(B, N, C)`` with the rows that tokens have which left."""
        if self.merges:
            return patches.gather(1, self.owner[..., None].expand_as(patches))
        assert self.frozen is not None
        return torch.where(self.present[..., None], patches, self.frozen)

    def _cut(self, count: int, patches: Tensor) -> None:
        """Let all but ``count`` patch tokens of each image leave."""
        assert self.received is not None
        for image, scores in enumerate(self.received.tolist()):
            left = self.present[image].nonzero().flatten().tolist()
            places = {p for p, position in enumerate(left) if position in self.safe[image]}
            ranked = [scores[position] for position in left]
            self._note_margin(ranked)
            kept = [left[place] for place in survivors(places, ranked, min(count, len(left)))]
            if self.merges:
                self._merge(image, left, kept, patches)
            self.present[image] = False
            self.present[image, kept] = True

    def _merge(self, image: int, left: list[int], kept: list[int], patches: Tensor) -> None:
        """Each token that leaves goes into the most similar one that stays, by cosine."""
        before, sizes = patches[image].detach().clone(), self.sizes[image]
        sums = {place: before[place] * sizes[place] for place in kept}
        weights = {place: float(sizes[place]) for place in kept}
        for place in (p for p in left if p not in kept):
            alike = torch.cosine_similarity(before[place], before[kept], dim=-1)
            self._note_margin(alike.tolist())
            into = kept[int(alike.argmax())]
            sums[into] = sums[into] + before[place] * sizes[place]
            weights[into] += float(sizes[place])
            self.owner[image, self.owner[image] == place] = into
        for place in kept:
            patches[image, place] = (sums[place] / weights[place]).to(patches.dtype)
            sizes[place] = weights[place]
        patches[image] = patches[image, self.owner[image]]

    def _note_margin(self, scores: Sequence[float]) -> None:
        ordered = sorted(scores)
        largest = max(map(abs, ordered), default=1.0) or 1.0
        gaps = [b - a for a, b in pairwise(ordered)]
        self.margin = min([self.margin, *(gap / largest for gap in gaps)])

    # ------------------------------------------------------------ attention

    def _begins(self, numbers: Iterator[int | None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.attending, self.block = True, next(numbers)

        return hook

    def _ends(self, module: nn.Module, args: Any, out: Any) -> None:
        self.attending = False

    def _averages(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor | None:
        (x,) = args
        if self.frozen is None or self.merges:
            return None
        weights = self._shown(x.shape[1], x.dtype)
        return (x * weights[..., None]).sum(1, keepdim=True) / weights.sum(1)[:, None, None]

    def _largest(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor | None:
        (x,) = args
        if self.frozen is None or self.merges:
            return None
        gone = self._shown(x.shape[1], x.dtype) == 0
        return x.masked_fill(gone[..., None], -torch.inf).amax(1)

    def _shown(self, length: int, dtype: torch.dtype) -> Tensor:
        """Which of ``length`` tokens are left, ``(B, length)``, as zeros and ones."""
        if length == self.count:
            return self.present.to(dtype)
        shown = torch.ones(self.present.shape[0], length, dtype=dtype)
        start = self.places.before
        shown[:, start : start + self.count] = self.present.to(dtype)
        return shown

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.attending and func in SOFTMAX:
            x, dim = args[0], args[1] % args[0].dim()
            probabilities = x.movedim(dim, -1).softmax(-1)
            if dim != x.dim() - 1:
                probabilities = self._masked(probabilities)
                return probabilities.movedim(-1, dim)
            return self._masked(probabilities)
        if self.attending and func is FUSED:
            return self._fused(*args, **kwargs)
        return func(*args, **kwargs)

    def _masked(self, probabilities: Tensor) -> Tensor:
        """Without the tokens that are gone; ``(B * h, Q, K)`` or ``(B, h, Q, K)``."""
        length = probabilities.shape[-1]
        shown = self._shown(length, probabilities.dtype)
        images = shown.shape[0]
        wide = probabilities.reshape(images, -1, *probabilities.shape[-2:])
        wide = wide * self._weights(shown)[:, None, None]
        wide = wide / wide.sum(-1, keepdim=True)
        if wide.shape[-2] == length:
            # What is gone may have seen nothing but what is gone.
            wide = wide.masked_fill(shown[:, None, :, None] == 0, 0.0)
            self._note_received(wide, shown)
            if self.merges:
                rows = torch.arange(length).repeat(images, 1)
                start = self.places.before
                rows[:, start : start + self.count] = self.owner + start
                wide = wide.gather(2, rows[:, None, :, None].expand_as(wide))
        return wide.reshape(probabilities.shape)

    def _weights(self, shown: Tensor) -> Tensor:
        """What tokens weigh as keys, ``(B, length)``."""
        if not self.merges:
            return shown
        if self.block is None:
            return torch.ones_like(shown)
        weights = shown.clone()
        start = self.places.before
        weights[:, start : start + self.count] *= self.sizes.to(shown.dtype)
        return weights

    def _note_received(self, probabilities: Tensor, shown: Tensor) -> None:
        if self.block is None:
            return
        start = self.places.before
        total = probabilities.detach().double().sum(-2).mean(1) / shown.sum(1, keepdim=True)
        self.received = total[:, start : start + self.count]
        if self.block == self.object_block:
            budget = list(self.cuts.values())[-1]
            rows = self.received.tolist()
            for scores in rows:
                self._note_margin(scores)
            self.safe = [safe_positions(row, self.places.grid, budget, self.alpha) for row in rows]

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float = 0.0,
        causal: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        scores = scores_of(query, key, causal, **others)
        probabilities = self._masked(scores.softmax(-1))
        return probabilities @ value, scores.logsumexp(-1)
