"""MLPs are found in every spelling, with all their linear layers.

Breaks if a gate, a third layer or a spelling of the linear layer is lost, or if layers between
which tokens see each other are taken for one MLP.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests import tiny
from tests.captured import trace
from tests.tiny import WIDTH
from tokenpass.blocks import Found

HIDDEN = 2 * WIDTH


class Spelled(nn.Module):
    """A function of the input and of three linear layers."""

    def __init__(self, function: Callable[[Spelled, Tensor], Tensor], joint: int = 1) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, joint * HIDDEN)
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.middle = nn.Linear(HIDDEN, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(HIDDEN)
        self.gamma = nn.Parameter(torch.rand(WIDTH))
        self.drop = nn.Dropout(0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def by_matmul(m: Spelled, x: Tensor) -> Tensor:
    hidden = functional.relu(x @ m.up.weight.T + m.up.bias)
    return torch.matmul(hidden, m.down.weight.T)


def by_convolution(m: Spelled, x: Tensor) -> Tensor:
    hidden = functional.conv1d(x.mT, m.up.weight[..., None], m.up.bias)
    return functional.conv1d(functional.silu(hidden), m.down.weight[..., None]).mT


def by_addmm(m: Spelled, x: Tensor) -> Tensor:
    rows = torch.addmm(m.up.bias, x.flatten(0, 1), m.up.weight.T)
    return torch.addmm(m.down.bias, rows.tanh(), m.down.weight.T).reshape(x.shape)


def swiglu(m: Spelled, x: Tensor) -> Tensor:
    gate, value = m.up(x).chunk(2, -1)
    out: Tensor = m.down(functional.silu(gate) * value)
    return out


Case = tuple[Callable[[Spelled, Tensor], Tensor], int, bool]

CASES: dict[str, Case] = {
    "two layers": (lambda m, x: m.down(functional.gelu(m.up(x))), 2, False),
    "tanh gelu": (lambda m, x: m.down(functional.gelu(m.up(x), approximate="tanh")), 2, False),
    "quick gelu": (
        lambda m, x: (lambda h: m.down(h * torch.sigmoid(1.702 * h)))(m.up(x)),
        2,
        True,
    ),
    "relu": (lambda m, x: m.down(m.up(x).relu()), 2, False),
    "squared relu": (lambda m, x: m.down(functional.relu(m.up(x)).square()), 2, False),
    "softplus": (lambda m, x: m.down(functional.softplus(m.up(x))), 2, False),
    "mish": (lambda m, x: m.down(functional.mish(m.up(x))), 2, False),
    "sine": (lambda m, x: m.down(m.up(x).sin()), 2, False),
    "gelu written out": (
        lambda m, x: (lambda h: m.down(0.5 * h * (1 + torch.erf(h / 2**0.5))))(m.up(x)),
        2,
        True,
    ),
    "dropout": (lambda m, x: m.drop(m.down(m.drop(functional.gelu(m.up(x))))), 2, False),
    "norm inside": (lambda m, x: m.down(m.norm(functional.gelu(m.up(x)))), 2, False),
    "layer scale": (lambda m, x: m.gamma * m.down(functional.gelu(m.up(x))), 2, False),
    "three layers": (
        lambda m, x: m.down(functional.gelu(m.middle(functional.gelu(m.up(x))))),
        3,
        False,
    ),
    "gate": (lambda m, x: m.down(functional.silu(m.gate(x)) * m.up(x)), 3, True),
    "gate behind": (lambda m, x: m.down(m.up(x) * functional.gelu(m.gate(x))), 3, True),
    "gate and norm": (lambda m, x: m.down(m.norm(m.up(x) * m.gate(x).sigmoid())), 3, True),
    "bilinear": (lambda m, x: m.down(m.up(x) * m.gate(x)), 3, True),
    "matmul": (by_matmul, 2, False),
    "convolution": (by_convolution, 2, False),
    "addmm": (by_addmm, 2, False),
}

VIEWED = ("convolution", "addmm")
"""The tokens are laid out anew before the first layer."""

JOINT: dict[str, Callable[[Spelled, Tensor], Tensor]] = {
    "chunk": swiglu,
    "split": lambda m, x: (lambda p: m.down(p[0] * functional.gelu(p[1])))(
        m.up(x).split(HIDDEN, -1)
    ),
    "slices": lambda m, x: (lambda h: m.down(functional.silu(h[..., :HIDDEN]) * h[..., HIDDEN:]))(
        m.up(x)
    ),
    "unflatten": lambda m, x: (lambda h: m.down(functional.silu(h[..., 0, :]) * h[..., 1, :]))(
        m.up(x).unflatten(-1, (2, -1))
    ),
    "glu": lambda m, x: m.down(functional.glu(m.up(x), -1)),
}


def found_in(make: Callable[[], nn.Module]) -> Found:
    return trace(tiny.encoder(mlp=make, depth=1), tiny.images()).found


@pytest.mark.parametrize("name", CASES)
def test_spelling(name: str) -> None:
    function, layers, multiplied = CASES[name]
    found = found_in(lambda: Spelled(function))
    (mlp,) = found.mlps
    (block,) = found.blocks
    assert block.mlps == (mlp,)
    assert len(mlp.linears) == layers
    assert mlp.gated == (layers == 3 and multiplied)
    read = mlp.input.args[0] if name in VIEWED else mlp.input
    (norm,) = (norm for norm in found.norms if norm.out is read)
    assert norm.input is block.residuals[0].out


@pytest.mark.parametrize("name", JOINT)
def test_joint_gate(name: str) -> None:
    """Breaks if the two halves of one projection are not seen to be multiplied."""
    found = found_in(lambda: Spelled(JOINT[name], 2))
    (mlp,) = found.mlps
    assert len(mlp.linears) == 2
    assert mlp in found.blocks[0].mlps


def test_the_parts_compute_the_branch() -> None:
    """Breaks if input or result name the wrong nodes: recomputed with the module itself."""
    model = tiny.encoder(depth=1)
    traced = trace(model, tiny.images())
    (mlp,) = traced.found.mlps
    values = traced.values()
    block = model.blocks[0]
    assert isinstance(block, tiny.Block)
    assert torch.equal(values[mlp.out], block.mlp(values[mlp.input]))


def test_order_of_layers_is_that_of_execution() -> None:
    traced = trace(tiny.encoder(depth=2), tiny.images())
    order = list(traced.graph.nodes)
    places = [order.index(linear) for mlp in traced.found.mlps for linear in mlp.linears]
    assert places == sorted(places)
    assert len(places) == 4


def test_a_head_over_pooled_tokens_is_an_mlp() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = tiny.encoder(depth=1), tiny.Mlp()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.encoder(x).mean(1))
            return out

    found = trace(Model().eval(), tiny.images()).found
    assert len(found.mlps) == 2
    assert len(found.blocks[0].mlps) == 1


class Neighbours(Spelled):
    """A depthwise convolution over the grid between the layers."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: x)
        self.around = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        side = tiny.SIDE // tiny.PATCH
        rows = self.up(x).mT.unflatten(2, (side, side))
        out: Tensor = self.down(functional.gelu(self.around(rows)).flatten(2).mT)
        return out


class Spatial(Spelled):
    """gMLP: the gate is a projection over the tokens."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: x)
        self.over_tokens = nn.Linear(tiny.TOKENS, tiny.TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.up(x))
        out: Tensor = self.down(hidden * self.over_tokens(hidden.mT).mT)
        return out


def test_neighbours_between_the_layers_are_a_miss() -> None:
    model = tiny.Encoder([tiny.Block(mlp=Neighbours)], prefix=0)
    traced = trace(model, tiny.images())
    assert not traced.found.mlps
    (miss,) = traced.found.misses
    assert miss.reason == "tokens see each other between its layers"
    assert [node.name for node in miss.nodes] == ["linear_3", "conv2d_1"]


def test_a_gate_over_tokens_is_no_mlp() -> None:
    """Breaks if a projection over tokens counts as a layer that treats each token alone."""
    model = tiny.Encoder([tiny.Block(mlp=Spatial)], prefix=0)
    found = trace(model, tiny.images()).found
    assert not found.mlps
    assert any("tokens see each other" in miss.reason for miss in found.misses)


def test_two_linear_layers_in_a_row_are_a_miss() -> None:
    found = found_in(lambda: Spelled(lambda m, x: m.down(m.up(x) * 2.0)))
    assert not found.mlps
    (miss,) = found.misses
    assert miss.reason == "no nonlinearity between two linear layers"
    assert len(miss.nodes) == 2
