"""Attention of generated encoders: one function of the tokens, in many spellings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.fuzz.positions import Distance, Relative, Rotary
from tests.fuzz.spec import Attention, Encoder


class Projections(nn.Module):
    """Queries ``(B, h, L, d)``, keys and values ``(B, g, L, d)`` from tokens ``(B, L, C)``."""

    def __init__(self, spec: Attention, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.kind = spec.projections if key_heads == heads else "separate"
        self.heads, self.key_heads, self.each = heads, key_heads, width // heads
        bias = spec.bias
        if self.kind in ("separate", "two"):
            self.query = nn.Linear(width, width, bias=bias)
        if self.kind == "separate":
            self.key = nn.Linear(width, key_heads * self.each, bias=bias)
            self.value = nn.Linear(width, key_heads * self.each, bias=bias)
        elif self.kind == "two":
            self.both = nn.Linear(width, 2 * width, bias=bias)
        elif self.kind == "batched":
            self.weight = nn.Parameter(torch.randn(3, heads, width, self.each) / width**0.5)
        else:
            self.joint = nn.Linear(width, 3 * width, bias=bias)

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.each))
        return heads.transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        if self.kind == "separate":
            return self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        if self.kind == "two":
            k, v = self.both(x).view(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            return self._split(self.query(x)), k, v
        if self.kind == "batched":
            q, k, v = torch.einsum("blc,zhcd->zbhld", x, self.weight).unbind(0)
            return q, k, v
        if self.kind == "chunks":
            q, k, v = self.joint(x).chunk(3, dim=-1)
            return self._split(q), self._split(k), self._split(v)
        if self.kind == "heads outside":
            parts = self.joint(x).reshape(batch, length, self.heads, 3 * self.each)
            q, k, v = parts.transpose(1, 2).split(self.each, -1)
            return q, k, v
        if self.kind == "views":
            weights = self.joint.weight.view(3, -1, x.shape[-1])
            biases: list[Tensor | None] = [None] * 3
            if self.joint.bias is not None:
                biases = [*self.joint.bias.chunk(3)]
            q, k, v = (
                self._split(functional.linear(x, w, b))
                for w, b in zip(weights, biases, strict=True)
            )
            return q, k, v
        q, k, v = self.joint(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v


class SelfAttention(nn.Module):
    """Attention of tokens ``(B, L, C)`` among themselves.

    Returns:
        The tokens that come out, and the probabilities where the spelling has them.
    """

    hidden: Tensor
    shown: Tensor

    def __init__(self, spec: Attention, encoder: Encoder) -> None:
        super().__init__()
        width = encoder.width
        self.spec, self.heads = spec, spec.heads
        self.each = width // self.heads
        self.key_heads = max(1, self.heads // spec.key_heads)
        self.factor = self.each**-0.5
        if spec.spelling in ("multihead", "weights"):
            self.multihead = nn.MultiheadAttention(
                width, self.heads, bias=spec.bias, batch_first=encoder.layout != "sequence first"
            )
            return
        self.projections = Projections(spec, width, self.heads, self.key_heads)
        self.out = nn.Linear(width, width, bias=spec.bias)
        if spec.norm == "layer":
            self.norm_q, self.norm_k = nn.LayerNorm(self.each), nn.LayerNorm(self.each)
        if spec.norm == "unit":
            self.temperature = nn.Parameter(torch.rand(self.heads, 1, 1) + 1.0)
        if spec.position in ("rotary", "halves", "computed"):
            self.rotary = Rotary(encoder, self.each, spec.position)
        if spec.position == "relative":
            self.bias: nn.Module = Relative(encoder, self.heads)
        if spec.position == "distance":
            self.bias = Distance(encoder, self.heads)
        length = encoder.tokens
        if spec.mask == "added":
            self.register_buffer("hidden", torch.randn(length, length))
        if spec.mask == "boolean":
            self.register_buffer("shown", torch.rand(length, length).add(torch.eye(length)) > 0.3)
        if spec.heads_mixed:
            mixing = (nn.Linear(self.heads, self.heads, bias=False) for _ in range(2))
            self.mix_scores, self.mix_shares = mixing

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        spec = self.spec
        if spec.spelling in ("multihead", "weights"):
            return self._multihead(x)
        q, k, v = self.projections(x)
        if spec.norm == "layer":
            q, k = self.norm_q(q), self.norm_k(k)
        if spec.norm == "unit":
            q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
            q = q * self.temperature
        if spec.position in ("rotary", "halves", "computed"):
            q, k = self.rotary(q), self.rotary(k)
        if self.key_heads != self.heads:
            k, v = (_repeated(y, self.heads // self.key_heads) for y in (k, v))
        out, shares = self._attend(q, k, v, self._added(x))
        return self.out(self._joined(out)), shares

    def _multihead(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = x if self.multihead.batch_first else x.transpose(0, 1)
        out, shares = self.multihead(y, y, y, need_weights=self.spec.spelling == "weights")
        return (out if self.multihead.batch_first else out.transpose(0, 1)), shares

    def _added(self, x: Tensor) -> Tensor | None:
        """What is added to the scores, broadcasting to ``(B, h, L, L)``."""
        parts: list[Tensor] = []
        if self.spec.position in ("relative", "distance"):
            parts.append(self.bias())
        if self.spec.mask == "added":
            parts.append(self.hidden)
        if self.spec.mask == "boolean":
            parts.append(torch.zeros_like(self.shown, dtype=x.dtype).masked_fill(~self.shown, -1e4))
        if self.spec.mask == "keys":
            parts.append((x.mean(-1) > 0.5).to(x.dtype)[:, None, None, :] * -3.0)
        if self.spec.mask == "causal":
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            parts.append(torch.zeros_like(later, dtype=x.dtype).masked_fill(later, -torch.inf))
        return sum(parts[1:], parts[0]) if parts else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        spec, kind = self.spec, self.spec.spelling
        batch, heads, length, each = q.shape
        if kind == "fused" and not spec.heads_mixed:
            if spec.scale in ("query", "key"):
                q = q * self.factor if spec.scale == "query" else q
                k = k * self.factor if spec.scale == "key" else k
                return functional.scaled_dot_product_attention(q, k, v, added, scale=1.0), None
            return functional.scaled_dot_product_attention(q, k, v, added), None
        if kind == "baddbmm" and not spec.heads_mixed:
            bias = torch.zeros(1, 1, length, length, dtype=q.dtype) if added is None else added
            spread = bias.expand(batch, heads, length, length).reshape(-1, length, length)
            joined = torch.baddbmm(spread, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=self.factor)
            shares = joined.softmax(-1).view(batch, heads, length, length)
            return shares @ v, shares
        scores = self._scores(q, k)
        if spec.heads_mixed:
            scores = self.mix_scores(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        scores = scores if added is None else scores + added
        if kind == "float32":
            wide = torch.promote_types(q.dtype, torch.float32)
            shares = scores.softmax(-1, dtype=wide).to(q.dtype)
        elif kind == "keys first":
            shares = scores.transpose(-2, -1).softmax(-2).transpose(-2, -1)
        else:
            shares = torch.softmax(scores, dim=-1)
        if spec.heads_mixed:
            shares = self.mix_shares(shares.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if kind == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", shares, v), shares
        if kind == "bmm":
            out = torch.bmm(shares.flatten(0, 1), v.flatten(0, 1))
            return out.view(batch, heads, length, each), shares
        return shares @ v, shares

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scale = self.spec.scale
        if scale == "query":
            q = q * self.factor
        elif scale == "key":
            k = k * self.factor
        elif scale == "both":
            q, k = q * math.sqrt(self.factor), k * math.sqrt(self.factor)
        scores = self._product(q, k)
        if scale == "divided":
            return scores / math.sqrt(self.each)
        return scores * self.factor if scale == "scores" else scores

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        kind = self.spec.spelling
        if kind == "einsum":
            return torch.einsum("bhqd,bhkd->bhqk", q, k)
        if kind == "bmm":
            joined = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
            return joined.view(*q.shape[:2], q.shape[2], k.shape[2])
        if kind == "transposed":
            return torch.matmul(k, q.mT).mT
        return q @ k.transpose(-2, -1)

    def _joined(self, out: Tensor) -> Tensor:
        batch, heads, length, each = out.shape
        join = self.spec.join
        if join == "permute":
            return out.permute(0, 2, 1, 3).reshape(batch, length, heads * each)
        if join == "cat":
            return torch.cat(out.unbind(1), -1)
        if join == "contiguous view":
            return out.transpose(1, 2).contiguous().view(batch, length, -1)
        return out.transpose(1, 2).flatten(2)


def _repeated(x: Tensor, times: int) -> Tensor:
    batch, heads, length, each = x.shape
    wide = x[:, :, None].expand(batch, heads, times, length, each)
    return wide.reshape(batch, heads * times, length, each)
