"""Any encoder with fewer tokens, without a rewrite: an executor that drops them by masking.

It runs the original model, eagerly and on all tokens, and looks at the operators that PyTorch
dispatches. A token that left weighs nothing as a key (a score of minus infinity; no value, either,
should heads be mixed behind the softmax) and in means over tokens; its rows are ignored: wherever
something of the stream's shape is added to the stream, they go back to what they were when the
token left. The cuts are given: what is compared is what is computed with them. Encoders whose
attentions it cannot tell apart are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.token_places import Tokens, tokens_of
from tokenpass.report import GraphReport

aten = torch.ops.aten

SOFTMAX = (aten._softmax.default, aten._safe_softmax.default)
FUSED = aten._scaled_dot_product_flash_attention_for_cpu.default
ADD = (aten.add.Tensor, aten.add_.Tensor)


def scores_of(
    query: Tensor,
    key: Tensor,
    causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What fused attention takes the softmax of, ``(B, h, Q, K)``."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.mT * factor
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores if attn_mask is None else scores + attn_mask


class Watching(TorchDispatchMode):
    """Sees the attentions among all tokens of ``images`` images, and what is added to the stream.

    Attributes:
        order: ``"attention"`` and ``"addition"``, as they came.
        ahead: How many tokens there can be, and how many of them are ahead of the patch tokens:
            all tokens, patch tokens alone, and either with more tokens that join them.
        lengths: Tokens of what was added.
        others: Whether as many tokens as there are patch tokens attend to one another, too.
    """

    def __init__(self, tokens: Tokens, images: int) -> None:
        super().__init__()
        self.tokens, self.images = tokens, images
        self.order: list[str] = []
        self.ahead = {tokens.count: 0, tokens.total: tokens.before}
        self.lengths: set[int] = set()
        self.others = False
        self._keys: int | None = None

    def probabilities(self, values: Tensor, keys: int) -> Tensor:
        """After a softmax, ``(B, h, Q, K)``; ``keys`` tokens are looked at."""
        return values

    def looked_at(self, values: Tensor) -> Tensor:
        """What a product with such probabilities takes: values ``(B * h, K, D)``."""
        return values

    def added(self, stream: Tensor) -> Tensor:
        return stream

    def mean(self, x: Tensor, dims: list[int], keepdim: bool) -> Tensor | None:
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is FUSED and self._is_attention(args[0].shape[-2], args[1].shape[-2]):
            return self._fused(*args, **kwargs)
        if (
            func is aten.bmm.default
            and self._keys == args[0].shape[-1]
            and args[0].shape[0] % self.images == 0
        ):
            self._keys = None
            args = (args[0], self.looked_at(args[1]))
        out = func(*args, **kwargs)
        if func is aten.cat.default:
            self._joined(args[0], args[1] % out.dim() if len(args) > 1 else 0)
        if func in SOFTMAX:
            return self._softmax(out, args[1] % out.dim())
        if func in ADD and self._is_stream(out, args):
            self.order.append("addition")
            changed = self.added(out)
            return out.copy_(changed) if func is aten.add_.Tensor else changed
        if func is aten.mean.dim and args[1] is not None:
            dims = [dim % args[0].dim() for dim in args[1]]
            mean = self.mean(args[0], dims, bool(args[2]) if len(args) > 2 else False)
            return out if mean is None else mean
        return out

    def _is_attention(self, queries: int, keys: int) -> bool:
        """Whether keys are tokens; notes those among all of them."""
        if queries == keys == self.tokens.total:
            self.order.append("attention")
        elif queries == keys == self.tokens.count:
            self.others = True
        return keys in self.ahead

    def _joined(self, operands: Sequence[Tensor], dim: int) -> None:
        """Other tokens are put beside those of a stream."""
        sizes = [x.shape[dim] if x.dim() == 3 else 0 for x in operands]
        for place, x in enumerate(operands):
            if self.token_dims(x)[:1] == [dim]:
                self.ahead.setdefault(sum(sizes), sum(sizes[:place]) + self.ahead[sizes[place]])
                return

    def _softmax(self, out: Tensor, dim: int) -> Tensor:
        wide = out.movedim(dim, -1)
        if wide.dim() < 3 or not self._is_attention(*wide.shape[-2:]):
            return out
        self._keys = wide.shape[-1]
        by_image = wide.reshape(self.images, -1, *wide.shape[-2:])
        shown = self.probabilities(by_image, wide.shape[-1])
        return shown.reshape(wide.shape).movedim(-1, dim)

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
        shown = self.probabilities(scores.softmax(-1), key.shape[-2])
        return shown @ value, scores.logsumexp(-1)

    def _is_stream(self, out: Tensor, operands: Sequence[Any]) -> bool:
        alike = [isinstance(x, Tensor) and x.shape == out.shape for x in operands[:2]]
        dims = self.token_dims(out)
        if dims[:1] not in ([0], [1]) or not all(alike):
            return False
        self.lengths.add(out.shape[dims[0]])
        return True

    def token_dims(self, x: Tensor) -> list[int]:
        """The dimension of a value ``(B, N, C)``, ``(N, B, C)`` or ``(B, C, N)`` of the tokens.

        Where there are as many channels as tokens, there are two; the likeliest comes first.
        """
        if x.dim() != 3:
            return []
        pairs = ((1, 0), (0, 1), (2, 0))
        return [d for d, b in pairs if x.shape[d] in self.ahead and x.shape[b] == self.images]

    def is_over_tokens(self, x: Tensor, dims: list[int], keepdim: bool) -> bool:
        """Whether a mean is; one over channels belongs to a norm and keeps its dimension."""
        found = self.token_dims(x)
        return len(dims) == 1 and (found[:1] == dims or (dims[0] in found and not keepdim))


class Masking(Watching):
    """Runs a model with fewer and fewer tokens.

    Args:
        tokens: Where they lie.
        cuts: ``{addition: patch tokens that are left from there on, (B, N), bool}``.
    """

    def __init__(self, tokens: Tokens, cuts: dict[int, Tensor]) -> None:
        super().__init__(tokens, next(iter(cuts.values())).shape[0])
        self.cuts = cuts
        self.present: Tensor | None = None
        self.frozen: Tensor | None = None

    def probabilities(self, values: Tensor, keys: int) -> Tensor:
        if self.present is None:
            return values
        shown = values * self._among(keys)[:, None, None]
        return shown / shown.sum(-1, keepdim=True)

    def looked_at(self, values: Tensor) -> Tensor:
        if self.present is None:
            return values
        by_image = values.reshape(self.images, -1, *values.shape[1:])
        return (by_image * self._among(values.shape[1])[:, None, :, None]).reshape(values.shape)

    def added(self, stream: Tensor) -> Tensor:
        if self.present is not None and self.frozen is not None:
            stream = torch.where(
                self._shown(stream, self.token_dims(stream)[0]), stream, self.frozen
            )
        cut = self.cuts.get(self.order.count("addition"))
        if cut is not None:
            self.present, self.frozen = cut, stream.clone()
        return stream

    def mean(self, x: Tensor, dims: list[int], keepdim: bool) -> Tensor | None:
        if self.present is None or not self.is_over_tokens(x, dims, keepdim):
            return None
        weights = self._shown(x, dims[0]).to(x.dtype)
        return (x * weights).sum(dims, keepdim) / weights.sum(dims, keepdim)

    def _shown(self, x: Tensor, dim: int) -> Tensor:
        """Which tokens of a value are left, to be broadcast with it."""
        shown = self._among(x.shape[dim])
        return shown.T[..., None] if dim == 0 else shown.unsqueeze(3 - dim)

    def _among(self, length: int) -> Tensor:
        """Patch tokens that are left, beside other tokens, which stay: ``(B, length)``."""
        assert self.present is not None
        shown = self.present.new_ones((self.images, length))
        first = self.ahead[length]
        shown[:, first : first + self.tokens.count] = self.present
        return shown


def with_fewer_tokens(
    run: Callable[[], Any], report: GraphReport, kept: Sequence[Tensor]
) -> tuple[Any] | None:
    """What a model computes with fewer tokens.

    Args:
        run: Calls the original model.
        report: On its only graph.
        kept: Grid positions of the tokens that each cut leaves, ``(B, K)``.

    Returns:
        The output, or ``None`` where it cannot be told which operators the cuts are between.
    """
    tokens = tokens_of(report)
    ends = [number for number, row in enumerate(report.blocks, 1) if row.tokens_out < row.tokens_in]
    counts = [count for row in report.blocks for count in (row.tokens_in, row.tokens_out)]
    again = counts != sorted(counts, reverse=True)  # blocks on all tokens see those that left
    if tokens is None or len(ends) != len(kept) or again:
        return None
    with _written_out():
        with Watching(tokens, kept[0].shape[0]) as watching:
            run()
        begins = [place for place, what in enumerate(watching.order) if what == "attention"]
        if len(begins) != len(report.blocks) or len(watching.lengths) != 1 or watching.others:
            return None
        begins.append(len(watching.order))
        cuts: dict[int, Tensor] = {}
        for end, positions in zip(ends, kept, strict=True):
            left = torch.zeros(positions.shape[0], tokens.count, dtype=torch.bool)
            block = report.blocks[end - 1].block
            before, number = (
                watching.order[:p].count("addition") for p in begins[end - 1 : end + 1]
            )
            if not block.mlps:
                number = min(number, before + len(block.residuals))
            cuts[number] = left.scatter(1, positions, True)
        with Masking(tokens, cuts):
            return (run(),)


@contextmanager
def _written_out() -> Iterator[None]:
    """``nn.MultiheadAttention`` as the operators that it is made of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
