"""The dense encoder of the recorded Eventful runs, in plain PyTorch, to be compiled.

Tokens `(B, N, D)` in, tokens out. `D` channels, `h` heads of width `d`, `N` tokens on a grid with
perhaps a class token before them, `Nk` keys (fewer than `N` where they are pooled).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes and options of an encoder.

    Attributes:
        window: Height and width of the windows of the blocks in ``windowed``; pads if need be.
        relative: Whether scores get decomposed relative positions (not with a class token).
        pool: Side of the cells over which keys and values are averaged.
        product: Precision of probabilities and values in their product; their own if ``None``.
    """

    dim: int
    heads: int
    depth: int
    grid: tuple[int, ...]
    hidden: int
    class_token: bool = False
    window: tuple[int, ...] = ()
    windowed: frozenset[int] = frozenset()
    relative: bool = False
    pool: int = 1
    product: torch.dtype | None = None

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] + self.class_token


class RelativePosition(nn.Module):
    """Scores from the vertical and the horizontal distance of query and key."""

    def __init__(self, size: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.size = size
        self.y_embedding = nn.Parameter(torch.zeros(2 * size[0] - 1, width))
        self.x_embedding = nn.Parameter(torch.zeros(2 * size[1] - 1, width))

    def forward(self, q: Tensor) -> Tensor:
        """Queries ``(B, h, N, d)``, not scaled, to ``(B, h, N, N)``."""
        q = q.unflatten(2, self.size)
        y = torch.einsum("bnyxd,ykd->bnyxk", q, _by_distance(self.y_embedding))
        x = torch.einsum("bnyxd,xkd->bnyxk", q, _by_distance(self.x_embedding))
        return (y[..., :, None] + x[..., None, :]).flatten(4, 5).flatten(2, 3)


def _by_distance(table: Tensor) -> Tensor:
    """Rows of a table ``(2 n - 1, d)`` for each pair of positions: ``(n, n, d)``."""
    place = torch.arange((len(table) + 1) // 2, device=table.device)
    return table[place[:, None] - place[None, :] + len(place) - 1]


class OracleBlock(nn.Module):
    """Norm, joint qkv, attention, projection, residual; norm, MLP, residual."""

    def __init__(self, shape: Shape, windowed: bool) -> None:
        super().__init__()
        self.shape, self.windowed = shape, windowed
        self.input_layer_norm = nn.LayerNorm(shape.dim, eps=1e-6)
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim)
        self.projection = nn.Linear(shape.dim, shape.dim)
        self.mlp_layer_norm = nn.LayerNorm(shape.dim, eps=1e-6)
        self.mlp_1 = nn.Linear(shape.dim, shape.hidden)
        self.mlp_2 = nn.Linear(shape.hidden, shape.dim)
        if shape.relative:
            size = shape.window if windowed else shape.grid
            self.relative_position = RelativePosition(size, shape.dim // shape.heads)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, N, 3 D)`` to q ``(B, h, N, d)``, k and v ``(B, h, Nk, d)``."""
        q, k, v = qkv.unflatten(-1, (3, self.shape.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.shape.pool > 1:
            k, v = (pooled(part, self.shape) for part in (k, v))
        return q, k, v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Without relative positions: ``(B, h, N, Nk)``."""
        out: Tensor = (q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1)
        return out

    def weights(self, q: Tensor, scores: Tensor) -> Tensor:
        if self.shape.relative:
            scores = scores + self.relative_position(q)
        return scores.softmax(-1)

    def attention(self, qkv: Tensor) -> Tensor:
        """Dense, heads merged: ``(B, N, 3 D)`` to ``(B, N, D)``."""
        if self.windowed:
            qkv = windows(qkv, self.qkv.bias, self.shape)
        q, k, v = self.heads(qkv)
        weights = self.weights(q, self.scores(q, k))
        mixed = (self.cast(weights) @ self.cast(v)).to(v.dtype)
        out = mixed.transpose(1, 2).flatten(2)
        return unwindowed(out, self.shape) if self.windowed else out

    def cast(self, x: Tensor) -> Tensor:
        return x if self.shape.product is None else x.to(self.shape.product)

    def mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp_2(functional.gelu(self.mlp_1(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.projection(self.attention(self.qkv(self.input_layer_norm(x))))
        return x + self.mlp(self.mlp_layer_norm(x))


def windows(qkv: Tensor, bias: Tensor, shape: Shape) -> Tensor:
    """``(B, N, C)`` to ``(B * windows, tokens of one, C)``; padding tokens are ``bias``."""
    (height, width), (rows, columns) = shape.grid, shape.window
    x = qkv.unflatten(1, shape.grid)
    batch, down, right = len(x), -height % rows, -width % columns
    if down:
        x = torch.cat((x, bias.expand(batch, down, width, -1)), 1)
    if right:
        x = torch.cat((x, bias.expand(batch, height + down, right, -1)), 2)
    x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
    out: Tensor = x.transpose(2, 3).flatten(0, 2).flatten(1, 2)
    return out


def unwindowed(x: Tensor, shape: Shape) -> Tensor:
    """The inverse, padding dropped: ``(B, N, C)``."""
    (height, width), (rows, columns) = shape.grid, shape.window
    down, across = -(-height // rows), -(-width // columns)
    x = x.unflatten(1, (rows, columns)).unflatten(0, (-1, down, across)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width].flatten(1, 2)


def pooled(x: Tensor, shape: Shape) -> Tensor:
    """Average over cells of the grid: ``(B, h, N, d)`` to ``(B, h, Nk, d)``."""
    grid = x.transpose(2, 3).unflatten(3, shape.grid).flatten(0, 1)
    small = functional.avg_pool2d(grid, shape.pool)
    out: Tensor = small.flatten(2).unflatten(0, x.shape[:2]).transpose(2, 3)
    return out


class Positions(nn.Module):
    """What is added to the tokens at the beginning."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.encoding = nn.Parameter(torch.zeros(1, shape.tokens, shape.dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.encoding


class OracleEncoder(nn.Module):
    """The recorded architecture: tokens ``(B, N, D)``, a class token first if any, to tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.position_encoding = Positions(shape)
        self.blocks = nn.ModuleList(
            OracleBlock(shape, index in shape.windowed) for index in range(shape.depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.position_encoding(x)
        for block in self.blocks:
            x = block(x)
        return x
