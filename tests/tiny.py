"""A vision transformer of a few channels whose parts a test exchanges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 8
HEADS = 2
PATCH = 2
SIDE = 8
"""Of the image; the grid has ``SIDE // PATCH`` rows."""

TOKENS = (SIDE // PATCH) ** 2

Part = Callable[[], nn.Module]


def images(batch: int = 2, side: int = SIDE, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, side, side, generator=generator).to(dtype)


class Attention(nn.Module):
    """Joint projection, fused attention."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(B, heads, N, d)``."""
        joint = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = joint.unbind(0)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self.attend(*self.project(x)).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH, hidden: int = 2 * WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(
        self,
        attention: Part = Attention,
        mlp: Part = Mlp,
        norm: Part = lambda: nn.LayerNorm(WIDTH),
    ) -> None:
        super().__init__()
        self.norm1, self.attention = norm(), attention()
        self.norm2, self.mlp = norm(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Encoder(nn.Module):
    """Patch embedding, position table, blocks.

    Args:
        blocks: In order; a block that comes twice shares its weights.
        prefix: Class and register tokens.
        side: Of the image.
        width: Channels.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix: int = 1,
        side: int = SIDE,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, PATCH, PATCH)
        self.blocks = nn.ModuleList(blocks)
        self.prefix = nn.Parameter(torch.randn(1, prefix, width))
        self.table = nn.Parameter(torch.randn(1, prefix + (side // PATCH) ** 2, width))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.prefix.shape[1]:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.table
        for block in self.blocks:
            x = block(x)
        return x


def encoder(attention: Part = Attention, mlp: Part = Mlp, depth: int = 2) -> Encoder:
    """An encoder of pre-norm blocks."""
    return Encoder([Block(attention, mlp) for _ in range(depth)])
