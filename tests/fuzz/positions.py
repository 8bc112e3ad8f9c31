"""Where tokens lie: tables that are added, biases of scores, rotations of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.fuzz.spec import Encoder

BASE = 100.0


def coordinates(encoder: Encoder) -> Tensor:
    """Row and column of each patch token, ``(N, 2)``."""
    rows, columns = encoder.grid
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(grid, -1).reshape(-1, 2)


def sinusoids(length: int, width: int) -> Tensor:
    """``(length, width)``, sines before cosines."""
    rates = BASE ** (-torch.arange(width // 2) / max(1, width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


class Table(nn.Module):
    """Positions that are added to tokens ``(B, L, C)``."""

    waves: Tensor

    def __init__(self, encoder: Encoder, length: int) -> None:
        super().__init__()
        self.kind = encoder.table if length == encoder.patches else "learned"
        self.grid = encoder.grid
        width, (rows, columns) = encoder.width, encoder.grid
        if self.kind == "learned":
            self.table = nn.Parameter(torch.randn(1, length, width))
        elif self.kind == "sliced":
            self.table = nn.Parameter(torch.randn(1, length + 3, width))
        elif self.kind == "axial":
            self.rows = nn.Parameter(torch.randn(rows, 1, width))
            self.columns = nn.Parameter(torch.randn(1, columns, width))
        elif self.kind == "sinusoid":
            self.register_buffer("waves", sinusoids(length, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "learned":
            return x + self.table
        if self.kind == "sliced":
            return x + self.table[:, 1 : 1 + x.shape[1]]
        if self.kind == "axial":
            return x + (self.rows + self.columns).flatten(0, 1)
        if self.kind == "sinusoid":
            return x + self.waves.unsqueeze(0)
        return x + sinusoids(x.shape[1], x.shape[2]).to(x.dtype)


class Relative(nn.Module):
    """A learned bias for each head and each difference of places, ``(1, h, L, L)``."""

    index: Tensor

    def __init__(self, encoder: Encoder, heads: int) -> None:
        super().__init__()
        rows, columns = encoder.grid
        places = coordinates(encoder)
        steps = places[:, None] - places[None] + torch.tensor([rows - 1, columns - 1])
        self.register_buffer("index", steps[..., 0] * (2 * columns - 1) + steps[..., 1])
        self.table = nn.Parameter(torch.randn((2 * rows - 1) * (2 * columns - 1), heads))
        self.around = (encoder.before, encoder.after) * 2

    def forward(self) -> Tensor:
        bias = self.table[self.index.view(-1)].view(*self.index.shape, -1).permute(2, 0, 1)
        return functional.pad(bias, self.around).unsqueeze(0)


class Distance(nn.Module):
    """The farther the key, the lower the score; a slope for each head, ``(1, h, L, L)``."""

    away: Tensor
    slopes: Tensor

    def __init__(self, encoder: Encoder, heads: int) -> None:
        super().__init__()
        places = coordinates(encoder).float()
        away = (places[:, None] - places[None]).norm(dim=-1)
        self.register_buffer("away", functional.pad(away, (encoder.before, encoder.after) * 2))
        self.register_buffer("slopes", 0.5 ** torch.arange(1, heads + 1))

    def forward(self) -> Tensor:
        return (-self.away * self.slopes[:, None, None]).unsqueeze(0)


class Rotary(nn.Module):
    """Pairs of channels of the patch tokens are turned by angles that grow with their place.

    Heads that are too narrow for pairs of rows and of columns are turned by one place number; heads
    of one channel are left alone.
    """

    angles: Tensor
    sines: Tensor
    cosines: Tensor

    def __init__(self, encoder: Encoder, each: int, kind: str) -> None:
        super().__init__()
        self.kind, self.each, self.patches = kind, each, encoder.patches
        self.before, self.after = encoder.before, encoder.after
        if each < 2:
            return
        places = coordinates(encoder).float()
        if each % 4 == 0:
            rates = BASE ** (-torch.arange(each // 4) / (each // 4))
            angles = (places[:, :, None] * rates).flatten(1)
        else:
            angles = torch.arange(encoder.patches)[:, None] * torch.ones(each // 2) * 0.3
        self.register_buffer("angles", angles)
        wide = torch.cat([angles, angles], -1)
        wide = angles.repeat_interleave(2, -1) if kind == "rotary" else wide
        self.register_buffer("sines", wide.sin())
        self.register_buffer("cosines", wide.cos())

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(B, h, L, d)``."""
        if self.each < 2:
            return x
        first, patches, last = x.split([self.before, self.patches, self.after], dim=2)
        turned = self._turned(patches)
        parts = [y for y, n in ((first, self.before), (turned, 1), (last, self.after)) if n]
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def _turned(self, x: Tensor) -> Tensor:
        if self.kind == "computed":
            sines, cosines = self.angles.sin().to(x.dtype), self.angles.cos().to(x.dtype)
            a, b = x.chunk(2, -1)
            return torch.cat([a * cosines - b * sines, a * sines + b * cosines], -1)
        if self.kind == "rotary":
            a, b = x[..., 0::2], x[..., 1::2]
            partner = torch.stack([-b, a], -1).flatten(-2)
        else:
            a, b = x.chunk(2, -1)
            partner = torch.cat([-b, a], -1)
        return x * self.cosines + partner * self.sines
