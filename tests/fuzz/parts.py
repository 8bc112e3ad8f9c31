"""Norms, MLPs, additions and detours of generated encoders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.fuzz.spec import Encoder

EXPERTS = 2
EPSILON = 1e-6
ALPHA = 0.5
SKIP = 0.9


class Norm(nn.Module):
    """Over the channels, which come last."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "layer":
            self.norm: nn.Module = nn.LayerNorm(width)
        elif kind == "root mean square":
            self.norm = nn.RMSNorm(width)
        elif kind == "batch":
            self.norm = nn.BatchNorm1d(width)
        elif kind == "written out":
            self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind == "batch":
            flat: Tensor = self.norm(x.reshape(-1, x.shape[-1]))
            return flat.view(x.shape)
        if self.kind == "written out":
            centred = x - x.mean(-1, keepdim=True)
            return centred * (centred.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt() * self.weight
        out: Tensor = self.norm(x)
        return out


class TokenMean(nn.Module):
    """Mean of tokens ``(B, L, C)``: ``(B, 1, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class TokenLargest(nn.Module):
    """Largest values of tokens ``(B, L, C)``: ``(B, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(1)


class Mlp(nn.Module):
    """Of tokens ``(B, L, C)``."""

    def __init__(self, kind: str, encoder: Encoder) -> None:
        super().__init__()
        width, hidden = encoder.width, 2 * encoder.width
        self.kind, self.encoder = kind, encoder
        if kind == "convolution":
            self.up: nn.Module = nn.Conv1d(width, hidden, 1)
            self.down: nn.Module = nn.Conv1d(hidden, width, 1)
            return
        self.up = nn.Linear(width, 2 * hidden if kind == "joint gate" else hidden)
        self.down = nn.Linear(hidden, width)
        if kind == "gated":
            self.gate = nn.Linear(width, hidden, bias=False)
        if kind == "depthwise":
            self.local = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        if kind == "excite":
            self.mean, self.weigh = TokenMean(), nn.Linear(width, width)
        if kind in ("experts", "expert choice"):
            self.choose = nn.Linear(width, EXPERTS)
            layers = (nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
            self.other = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        y: Tensor
        if kind == "relu":
            y = self.down(torch.relu(self.up(x)))
        elif kind == "gated":
            y = self.down(functional.silu(self.gate(x)) * self.up(x))
        elif kind == "joint gate":
            a, b = self.up(x).chunk(2, dim=-1)
            y = self.down(functional.gelu(a) * b)
        elif kind == "convolution":
            y = self.down(functional.gelu(self.up(x.mT))).mT
        elif kind == "depthwise":
            y = self.down(functional.gelu(over_grid(self.local, self.up(x), self.encoder)))
        elif kind == "expert choice":
            y = self._expert_choice(x)
        else:
            y = self._plain(x)
        if kind == "excite":
            y = y * torch.sigmoid(self.weigh(self.mean(x)))
        if kind == "experts":
            best = functional.one_hot(self.choose(x).argmax(-1), EXPERTS).to(x.dtype)
            y = y * best[..., :1] + self.other(x) * best[..., 1:]
        return y

    def _expert_choice(self, x: Tensor) -> Tensor:
        """Each expert takes its half of the tokens: which ones depends on all of them."""
        share, places = self.choose(x).softmax(-1).mT.topk(x.shape[1] // EXPERTS, dim=-1)
        y = torch.zeros_like(x)
        experts: tuple[Callable[[Tensor], Tensor], ...] = (self._plain, self.other)
        for number, expert in enumerate(experts):
            index = places[:, number, :, None].expand(-1, -1, x.shape[-1])
            out = expert(x.gather(1, index)) * share[:, number, :, None]
            y = y.scatter_add(1, index, out.to(y.dtype))
        return y

    def _plain(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.gelu(self.up(x)))
        return y


def over_grid(layer: nn.Module, x: Tensor, encoder: Encoder) -> Tensor:
    """A convolution over the patch tokens among ``(B, L, C)``; other tokens stay as they are."""
    first, patches, last = x.split([encoder.before, encoder.patches, encoder.after], dim=1)
    image = layer(patches.transpose(1, 2).unflatten(2, encoder.grid))
    return torch.cat([first, image.flatten(2).transpose(1, 2), last], 1)


class Addition(nn.Module):
    """A branch is added to the stream."""

    def __init__(self, kind: str, encoder: Encoder) -> None:
        super().__init__()
        self.kind = kind
        self.out = nn.Identity()
        if kind in ("scaled", "addcmul"):
            ones = {"channels first": (1, 1), "image": (1, 1, 1)}
            shape = ones.get(encoder.layout, (1,))[:-1]
            self.gain = nn.Parameter(torch.ones(encoder.width, *shape))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        out: Tensor = self.out(self._sum(x, branch))
        return out

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        match self.kind:
            case "reversed":
                return y + x
            case "in place":
                return y.add_(x)
            case "scaled":
                return x + self.gain * y
            case "addcmul":
                return torch.addcmul(x, self.gain, y)
            case "alpha":
                return torch.add(x, y, alpha=ALPHA)
            case "weighted skip":
                return SKIP * x + y
        return x + y


def detour(x: Tensor, kind: str, encoder: Encoder) -> Tensor:
    """``x`` ``(B, L, C)`` again, after a way round."""
    batch, length, width = x.shape
    match kind:
        case "permutation":
            return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        case "flat":
            return x.reshape(-1, width).view(batch, length, width)
        case "grid":
            return over_grid(nn.Identity(), x, encoder)
        case "split":
            return torch.cat(x.split([1, length - 1], dim=1), 1)
        case "padded":
            return functional.pad(x, (0, 0, 1, 2))[:, 1:-2]
        case "rolled":
            return x.roll(1, 1).roll(-1, 1)
        case "flipped":
            return x.flip(1).flip(1)
        case "float64":
            return x.double().to(x.dtype)
        case "stacked":
            return torch.stack([x, x.detach()], 1)[:, 0]
    return x
