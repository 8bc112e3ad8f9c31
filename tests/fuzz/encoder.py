"""Builds the encoder that a spec describes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.fuzz.attention import SelfAttention
from tests.fuzz.layouts import rows_of, stream_of
from tests.fuzz.parts import Addition, Mlp, Norm, TokenLargest, TokenMean, detour, over_grid
from tests.fuzz.positions import Table
from tests.fuzz.spec import Block, Encoder

SPREAD = 0.3
"""Of what is added to biases and to the weights of norms, so that no two are equal."""


class Windows(nn.Module):
    """Attention in the upper and in the lower half of the grid; other tokens get nothing."""

    def __init__(self, block: Block, encoder: Encoder) -> None:
        super().__init__()
        rows, columns = encoder.grid
        half = replace(encoder, grid=(rows // 2, columns), prefix=0, suffix=0, layout="tokens")
        self.attention, self.encoder = SelfAttention(block.attention, half), encoder

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        before, after, patches = self.encoder.before, self.encoder.after, self.encoder.patches
        halves = x[:, before : before + patches].unflatten(1, (2, -1)).flatten(0, 1)
        out = self.attention(halves)[0].unflatten(0, (-1, 2)).flatten(1, 2)
        return functional.pad(out, (0, 0, before, after)), None


class EncoderBlock(nn.Module):
    """One block; ``attended`` is what its attention added, for encoders that return it."""

    def __init__(self, spec: Block, encoder: Encoder) -> None:
        super().__init__()
        self.spec, self.encoder = spec, encoder
        self.windowed = spec.attention.window and encoder.grid[0] % 2 == 0
        kind = Windows(spec, encoder) if self.windowed else SelfAttention(spec.attention, encoder)
        self.attention: nn.Module = kind
        self.norm1, self.norm2 = (Norm(spec.norms, encoder.width) for _ in range(2))
        if spec.placement == "sandwich":
            self.norm3, self.norm4 = (Norm(spec.norms, encoder.width) for _ in range(2))
        self.mlp = None if spec.mlp == "none" else Mlp(spec.mlp, encoder)
        self.add1, self.add2 = (Addition(spec.residual, encoder) for _ in range(2))
        if spec.local:
            width = encoder.width
            self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
            self.add0 = Addition("plus", encoder)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spec, norm1, norm2 = self.spec, self.norm1, self.norm2
        if spec.local:
            x = self.add0(x, self._over_grid(x))
        pre = spec.placement != "post"
        rows = rows_of(x, self.encoder.layout)
        attended = self._attend(norm1(rows) if pre else rows)
        if spec.placement == "sandwich":
            attended = self.norm3(attended)
        branch = stream_of(attended, self.encoder)
        if spec.placement in ("parallel", "one sum") and self.mlp is not None:
            beside = stream_of(self.mlp(norm2(rows)), self.encoder)
            if spec.placement == "one sum":
                return self.add1(x, branch + beside), attended
            return self.add2(self.add1(x, branch), beside), attended
        x = self.add1(x, branch)
        if not pre:
            x = stream_of(norm1(rows_of(x, self.encoder.layout)), self.encoder)
        return self._after_mlp(x, pre), attended

    def _after_mlp(self, x: Tensor, pre: bool) -> Tensor:
        if self.mlp is None:
            return x
        rows = rows_of(x, self.encoder.layout)
        hidden = self.mlp(self.norm2(rows) if pre else rows)
        if self.spec.placement == "sandwich":
            hidden = self.norm4(hidden)
        x = self.add2(x, stream_of(hidden, self.encoder))
        if not pre:
            x = stream_of(self.norm2(rows_of(x, self.encoder.layout)), self.encoder)
        return x

    def _attend(self, rows: Tensor) -> Tensor:
        out: Tensor = self.attention(detour(rows, self.spec.detour, self.encoder))[0]
        return out

    def _over_grid(self, x: Tensor) -> Tensor:
        rows = rows_of(x, self.encoder.layout)
        return stream_of(over_grid(self.conv, rows, self.encoder), self.encoder)


class BuiltIn(nn.Module):
    """``nn.TransformerEncoderLayer``; what its attention added is hidden in it."""

    windowed = False

    def __init__(self, spec: Block, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.width
        self.layer = nn.TransformerEncoderLayer(
            width,
            spec.attention.heads,
            2 * width,
            dropout=0.0,
            activation="relu" if spec.mlp == "relu" else "gelu",
            batch_first=encoder.layout != "sequence first",
            norm_first=spec.placement != "post",
            bias=spec.attention.bias,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder.layout == "sequence first":
            x = self.layer(x)
            return x, rows_of(x, self.encoder.layout)
        rows = self.layer(rows_of(x, self.encoder.layout))
        return stream_of(rows, self.encoder), rows


def block_of(spec: Block, encoder: Encoder) -> nn.Module:
    return BuiltIn(spec, encoder) if spec.built_in else EncoderBlock(spec, encoder)


class Patches(nn.Module):
    """Images ``(B, 3, H, W)`` to patch tokens ``(B, N, C)``."""

    def __init__(self, spec: Encoder) -> None:
        super().__init__()
        self.kind, side, width = spec.embed, spec.patch, spec.width
        self.side = side
        if self.kind in ("unfold", "reshape", "linear map"):
            self.linear = nn.Linear(3 * side * side, width)
        elif self.kind == "overlapping":
            self.conv: nn.Module = nn.Conv2d(3, width, 3, side, padding=1)
        elif self.kind == "stem":
            first = nn.Conv2d(3, width, 3, padding=1)
            self.conv = nn.Sequential(first, nn.GELU(), nn.Conv2d(width, width, side, side))
        else:
            self.conv = nn.Conv2d(3, width, side, side)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor
        side = self.side
        batch, colours, height, width = images.shape
        if self.kind == "unfold":
            out = self.linear(functional.unfold(images, side, stride=side).transpose(1, 2))
        elif self.kind == "reshape":
            cells = images.view(batch, colours, height // side, side, width // side, side)
            out = self.linear(cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * 3))
        elif self.kind == "linear map":
            cells = images.unfold(2, side, side).unfold(3, side, side)
            out = self.linear(cells.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2))
        else:
            out = self.conv(images).flatten(2).transpose(1, 2)
        return out


class Pool(nn.Module):
    """A learned query attends to tokens ``(B, L, C)``: ``(B, C)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.both = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.both(x).chunk(2, -1)
        shares = (self.query @ k.transpose(1, 2) * k.shape[-1] ** -0.5).softmax(-1)
        pooled: Tensor = shares @ v
        return pooled.squeeze(1)


class Model(nn.Module):
    """The encoder of a spec."""

    def __init__(self, spec: Encoder) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.embed = Patches(spec)
        self.first = nn.Parameter(torch.randn(1, spec.before, width)) if spec.before else None
        self.last = nn.Parameter(torch.randn(1, spec.after, width)) if spec.after else None
        length = spec.patches if spec.table_over == "patches" else spec.tokens
        self.table = None if spec.table == "none" else Table(spec, length)
        self.blocks = nn.ModuleList(block_of(block, spec) for block in spec.blocks)
        self.norm = Norm("layer" if spec.final_norm else "none", width)
        self.mean, self.pool, self.linear = TokenMean(), Pool(width), nn.Linear(width, 5)
        self.largest = TokenLargest()
        self.pixels = nn.Linear(width, spec.patch**2)

    def forward(self, images: Tensor) -> Any:
        if self.spec.rounds:
            with torch.autocast("cpu", torch.bfloat16):
                return self._forward(images)
        return self._forward(images)

    def _forward(self, images: Tensor) -> Any:
        spec = self.spec
        patches = self.embed(images)
        x = stream_of(self._with_others(patches), spec)
        if spec.breaks:
            torch._dynamo.graph_break()
        hidden: list[Tensor] = []
        attended = patches
        for block in self.blocks:
            x, attended = (self.blocks[0] if spec.shared else block)(x)
            hidden.append(x)
        if spec.dead:
            (rows_of(x, spec.layout).softmax(1).cumsum(1) @ self.linear.weight.T).sum()
        rows = self.norm(rows_of(x, spec.layout))
        out = self._head(rows)
        match spec.extra:
            case "hidden":
                return out, hidden
            case "patches":
                return [out, patches]
            case "dictionary":
                return {"out": out, "tokens": rows}
            case "branch":
                return out, attended
            case "view":
                return out, rows, rows[:, 1:], rows.transpose(0, 1)
        return out

    def _with_others(self, patches: Tensor) -> Tensor:
        over_all = self.spec.table_over == "all"
        if self.table is not None and not over_all:
            patches = self.table(patches)
        parts = [patches]
        if self.first is not None:
            parts.insert(0, self.first.expand(len(patches), -1, -1))
        if self.last is not None:
            parts.append(self.last.repeat(len(patches), 1, 1))
        x = torch.cat(parts, 1) if len(parts) > 1 else patches
        return self.table(x) if self.table is not None and over_all else x

    def _head(self, rows: Tensor) -> Any:
        spec = self.spec
        patches = rows[:, spec.before : spec.before + spec.patches]
        match spec.head:
            case "class" if spec.before:
                return self.linear(rows[:, 0])
            case "mean":
                return self.linear(self.mean(patches).squeeze(1))
            case "mean of all":
                return self.linear(self.mean(rows)[:, 0])
            case "sum":
                return self.linear(patches.sum(1) / spec.patches)
            case "largest":
                return self.linear(self.largest(patches))
            case "attention":
                return self.linear(self.pool(rows))
            case "dense":
                cells = self.pixels(patches).transpose(1, 2).unflatten(2, spec.grid)
                return functional.pixel_shuffle(cells, spec.patch)
            case "pair":
                return rows[:, :1], patches
        return stream_of(rows, spec)


def build(spec: Encoder) -> Model:
    """The encoder in eval mode, with random weights of which no two are alike."""
    torch.manual_seed(spec.seed)
    model = Model(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return model.double() if spec.double else model


def images_of(spec: Encoder, frame: int = 0) -> Tensor:
    """A batch of images; another one for each frame."""
    rows, columns = spec.grid
    generator = torch.Generator().manual_seed(spec.seed * 100 + frame)
    dtype = torch.float64 if spec.double else torch.float32
    shape = (spec.batch, 3, rows * spec.patch, columns * spec.patch)
    return torch.randn(shape, generator=generator).to(dtype)
