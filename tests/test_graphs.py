"""Graphs as Dynamo really makes them: several of them, shapes that change, sizes that collide."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.output_graph
from torch import Tensor, nn
from torch.nn import functional

import tokenpass
from tests.zoo import BY_NAME, relative_error


class Plain(nn.Module):
    """A vision transformer without a class token; every size is the caller's."""

    def __init__(self, side: int, width: int, heads: int, depth: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(side * side, width))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.stem(images).flatten(2).transpose(1, 2) + self.position
        for layer in range(len(self.qkv)):
            x = self.block(x, layer)
        return x

    def block(self, x: Tensor, layer: int) -> Tensor:
        b, n, c = x.shape
        joint = self.qkv[layer](functional.layer_norm(x, (c,)))
        q, k, v = joint.view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out[layer](attended.reshape(b, n, c))
        return x + self.down[layer](functional.gelu(self.up[layer](x)))  # type: ignore[no-any-return]


def compiled(model: Any, *, dynamic: bool | None = None, **options: Any) -> Any:
    options = {"inner": "eager", **options}
    return torch.compile(model, backend="tokenpass", options=options, dynamic=dynamic)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 8])
def test_equal_sizes_are_told_apart(heads: int) -> None:
    """64 tokens, 64 channels, batch of 64. Breaks if an axis is recognised by its size."""
    model = Plain(side=8, width=64, heads=heads).eval()
    images = torch.randn(64, 3, 32, 32)
    full = compiled(model, keep=1.0, always_rewrite=True, dropped="discard")
    assert torch.equal(full(images), model(images))
    fast = compiled(model, keep=0.5, output="pruned")
    found = fast(images)
    kept = tokenpass.kept(fast)
    assert found.shape == (64, 32, 64)
    assert kept.shape == (64, 32)
    alone = compiled(model, keep=0.5, output="pruned", alpha=0.1000001)
    for image in (0, 17, 63):
        assert relative_error(alone(images[image : image + 1]), found[image : image + 1]) <= 1e-5
        assert torch.equal(tokenpass.kept(alone)[0], kept[image])


class Broken(nn.Module):
    """The same model, with something in the middle that Dynamo cannot trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        x = images.mul(2.0).div(2.0)
        torch._dynamo.graph_break()
        return self.model(x).mean(1)  # type: ignore[no-any-return]


@pytest.mark.slow
@torch.no_grad()
def test_several_graphs() -> None:
    """Breaks if a graph without attention stops the others, or is not accounted for."""
    model = Broken(Plain(side=8, width=48, heads=3)).eval()
    images = torch.randn(2, 3, 32, 32)
    fast = compiled(model, keep=1.0, always_rewrite=True, dropped="discard")
    with pytest.warns(tokenpass.TokenpassWarning, match="nothing to convert"):
        pruned = compiled(model, keep=0.5)(images)
    assert pruned.shape == (2, 48)
    assert torch.equal(fast(images), model(images))
    report = tokenpass.report(fast)
    assert len(report.graphs) == 2
    assert report.converted
    assert len(report.blocks) == 3
    assert tokenpass.kept(fast).shape == (2, 64)


@pytest.mark.slow
@torch.no_grad()
def test_recompiled_image_sizes() -> None:
    """Breaks if what was learnt on one image size is used for another."""
    entry = BY_NAME["transformers/Dinov2Model"]
    model = entry.build()
    fast = compiled(model, keep=0.5, dynamic=True)
    for height, width, tokens in ((64, 64, 32), (64, 96, 48), (32, 64, 16)):
        images = torch.randn(2, 3, height, width)
        assert fast(images).last_hidden_state.shape == model(images).last_hidden_state.shape
        assert tokenpass.kept(fast).shape == (2, tokens)


@pytest.mark.slow
@torch.no_grad()
def test_images_do_not_see_each_other() -> None:
    """Breaks if one image's tokens decide for another's. Batch of one is the reference."""
    entry = BY_NAME["timm/eva02_tiny_patch14_224"]
    model, images = entry.build(), entry.images(3)
    fast = compiled(model, keep=0.4, dynamic=False)
    together = fast(images)
    kept = tokenpass.kept(fast)
    for place, image in enumerate(images.split(1)):
        assert relative_error(fast(image), together[place : place + 1]) <= 1e-5
        assert torch.equal(tokenpass.kept(fast)[0], kept[place])


class Halting(nn.Module):
    """A block whose attention comes after something that Dynamo cannot trace."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.joint = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.joint(x)[:, None].chunk(3, -1)
        torch._dynamo.graph_break()
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + attended[:, 0]


@torch.no_grad()
def test_a_graph_that_serves_two_blocks_is_counted_twice() -> None:
    """Breaks if attention in a graph that runs again counts as attention outside of all graphs."""
    model = nn.Sequential(Halting(16), Halting(16))
    report = tokenpass.explain(model, torch.randn(2, 8, 16))
    assert report.attentions
    assert not any("ran outside" in item.reason for item in report.refusals)


def test_what_torch_cannot_trace_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a model that no backend compiles makes ``explain`` crash."""

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no fake value")

    monkeypatch.setattr(torch._dynamo.output_graph.OutputGraph, "compile_subgraph", fails)
    report = tokenpass.explain(nn.Linear(4, 4), torch.randn(2, 4))
    assert not report.converted
    assert "torch.compile itself fails on this model" in report.refusals[-1].reason


class Packed(nn.Module):
    """Images of different sizes as a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = torch.nested.nested_tensor([a, b], layout=torch.jagged)
        return self.joint(x).to_padded_tensor(0.0)  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.filterwarnings("error:.*failed")
@pytest.mark.parametrize("method", [tokenpass.HiPrune(keep=0.5), tokenpass.Eventful(keep=0.5)])
def test_nested_tensors_are_a_refusal(method: tokenpass.HiPrune | tokenpass.Eventful) -> None:
    """Breaks if a graph of nested tensors is tried, and undone with a warning."""
    model, images = Packed(), (torch.randn(5, 8), torch.randn(7, 8))
    fast: Any = torch.compile(model, backend=tokenpass.backend(method, inner="eager"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tokenpass: .*nested", tokenpass.TokenpassWarning)
        found = fast(*images)
    assert torch.equal(found, model(*images))
    refusals = tokenpass.report(fast).refusals
    assert refusals
    assert any("nested tensor" in item.reason for item in refusals)
