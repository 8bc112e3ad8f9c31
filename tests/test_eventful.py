"""Gated models against the dense ones: full budget, static scenes, attention that is kept up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import tokenpass
from tests import tiny
from tests.zoo import BY_NAME, relative_error

TOLERANCE = 1e-5
"""Of float32, relative to the largest output."""

Maker = Callable[[], nn.Module]


def gated(model: Any, method: tokenpass.Eventful, inner: Any = "eager") -> Any:
    backend = tokenpass.backend(method, inner=inner, always_rewrite=True)
    return torch.compile(model, backend=backend, dynamic=False)


def eventful(**options: Any) -> tokenpass.Eventful:
    return tokenpass.Eventful(**{"scene_cut": None, **options})


def tensor_of(output: Any) -> Tensor:
    x: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    return x


def walk(first: Tensor, frames: int, seed: int = 0) -> Iterator[Tensor]:
    """A quarter of the cells of the picture change from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    x = first
    for _ in range(frames):
        yield x
        cells = torch.rand(*x.shape[:-2], 4, 4, generator=generator) < 0.25
        mask = functional.interpolate(cells.float().flatten(0, -4), size=x.shape[-2:])
        x = x + 0.3 * torch.randn(x.shape, generator=generator) * mask.reshape(x.shape)


# ---------------------------------------------------------------- architectures


def _swin() -> nn.Module:
    return timm.create_model(  # type: ignore[no-any-return]
        "swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2), embed_dim=32, num_heads=(2, 2)
    )


def _sam() -> nn.Module:
    return timm.create_model(  # type: ignore[no-any-return]
        "samvit_base_patch16", img_size=160, embed_dim=48, depth=2, num_heads=2, num_classes=0,
        global_attn_indexes=(1,), window_size=4,
    )  # fmt: skip


def _videomae() -> nn.Module:
    return transformers.VideoMAEModel(  # type: ignore[no-any-return]
        transformers.VideoMAEConfig(
            image_size=32, patch_size=8, num_frames=4, hidden_size=48, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=96,
        )
    )  # fmt: skip


ZOO = (
    "timm/vit_tiny_patch16_224",
    "timm/vit_small_patch14_dinov2",
    "timm/vit_base_patch16_siglip_224",
    "timm/eva02_tiny_patch14_224",
    "timm/beit_base_patch16_224",
    "transformers/CLIPVisionModel",
)

ARCHITECTURES: dict[str, tuple[Maker, tuple[int, ...]]] = {
    **{name: (BY_NAME[name].build, (3, BY_NAME[name].size, BY_NAME[name].size)) for name in ZOO},
    "swin": (_swin, (3, 56, 56)),
    "sam": (_sam, (3, 160, 160)),
    "videomae": (_videomae, (4, 3, 32, 32)),
}


QUICK = {"timm/vit_small_patch14_dinov2", "swin"}
everywhere = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in ARCHITECTURES],
)


@everywhere
@torch.no_grad()
def test_full_budget_is_the_dense_model(name: str) -> None:
    """Breaks if a row is computed with another token's table, or written to another place."""
    make, shape = ARCHITECTURES[name]
    torch.manual_seed(1)
    model = make().eval()
    for method in (eventful(keep=1.0), eventful(threshold=0.0)):
        fast = gated(model, method)
        for x in walk(torch.randn(2, *shape), 3):
            assert relative_error(tensor_of(fast(x)), tensor_of(model(x))) <= TOLERANCE
        stats = tokenpass.stats(fast)
        assert stats.computed_in_full == ""
        assert tokenpass.report(fast).converted
        assert tokenpass.report(fast).blocks


@pytest.mark.slow
@everywhere
@torch.no_grad()
def test_a_static_scene_settles(name: str) -> None:
    """Breaks if a gate forgets a token, or a buffer keeps what nobody updates."""
    make, shape = ARCHITECTURES[name]
    torch.manual_seed(1)
    model = make().eval()
    fast = gated(model, eventful(keep=0.5))
    *_, last = walk(torch.randn(1, *shape), 3)
    for x in walk(torch.randn(1, *shape), 2):
        fast(x)
    depth = len(tokenpass.report(fast).blocks)
    for _ in range(3 * depth * 2):
        settled = tensor_of(fast(last))
    assert relative_error(settled, tensor_of(model(last))) <= TOLERANCE
    assert relative_error(tensor_of(fast(last)), settled) <= TOLERANCE


# ---------------------------------------------------------------- properties

encoders = st.builds(
    lambda depth, heads, width, prefix: (depth, heads, heads * width, prefix),
    st.integers(1, 2),
    st.sampled_from((1, 2)),
    st.sampled_from((4, 8)),
    st.integers(0, 2),
)


class Encoder(nn.Module):
    """Pre-norm blocks over patches and prefix tokens; sizes that collide are welcome."""

    def __init__(self, depth: int, heads: int, width: int, prefix: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, 2)
        self.prefix = nn.Parameter(torch.randn(1, prefix, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.attentions = nn.ModuleList(tiny.Attention(width, heads) for _ in range(depth))
        self.mlps = nn.ModuleList(tiny.Mlp(width, 2 * width) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        for place, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * place](x))
            x = x + mlp(self.norms[2 * place + 1](x))
        out: Tensor = x
        return out


@pytest.mark.slow
@given(
    shape=encoders,
    batch=st.integers(1, 3),
    keep=st.sampled_from((1, 0.25, 0.6)),
    threshold=st.sampled_from((None, 0.3)),
    before=st.booleans(),
    attention=st.sampled_from(("exact", "scores")),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_exact_attention_is_dense_attention_on_the_buffers(
    shape: tuple[int, ...],
    batch: int,
    keep: float,
    threshold: float | None,
    before: bool,
    attention: str,
    seed: int,
) -> None:
    """Breaks if the state of an attention is not that of the buffered queries, keys and values."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = Encoder(*shape).eval()
    options = {"keep": keep, "threshold": threshold, "gate_before_norm": before}
    fast = gated(model, eventful(attention=attention, **options))
    dense = gated(model, eventful(attention="none", **options))
    for x in walk(torch.randn(batch, 3, 16, 16), 4, seed):
        assert relative_error(fast(x), dense(x)) <= TOLERANCE
    assert tokenpass.report(fast).refusals == []


@pytest.mark.slow
@torch.no_grad()
def test_the_state_of_exact_attention_is_small() -> None:
    """Breaks if a map of all pairs of tokens is remembered, or more copies than are needed."""
    model = Encoder(1, 6, 384, 1).eval()
    sizes = {}
    for attention in ("exact", "delta"):
        fast = gated(model, eventful(keep=0.05, attention=attention))
        fast(torch.randn(1, 3, 128, 128))
        sizes[attention] = tokenpass.stats(fast).state_bytes
    assert sizes["exact"] <= 0.15 * sizes["delta"]


@torch.no_grad()
def test_exact_attention_is_updated_where_that_pays() -> None:
    """Breaks if the update is wrong, or always falls back to dense attention."""
    torch.manual_seed(0)
    model = Encoder(2, 2, 16, 1).eval()
    fast = gated(model, eventful(keep=0.05, attention="exact"))
    dense = gated(model, eventful(keep=0.05, attention="none"))
    for x in walk(torch.randn(1, 3, 64, 64), 6):
        assert relative_error(fast(x), dense(x)) <= TOLERANCE
    assert tokenpass.stats(fast).flops < 0.7 * tokenpass.stats(dense).flops


@pytest.mark.slow
@given(shape=encoders, keep=st.sampled_from((3, 0.4)), seed=st.integers(0, 99))
@torch.no_grad()
def test_a_gate_lets_through_its_budget(shape: tuple[int, ...], keep: float, seed: int) -> None:
    """Breaks if images share a budget, or a prefix token is left out or counted."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    fast = gated(Encoder(*shape).eval(), eventful(keep=keep))
    for x in walk(torch.randn(2, 3, 16, 16), 2, seed):
        fast(x)
    prefix, wanted = shape[-1], keep if isinstance(keep, int) else round(keep * 64)
    for mask in tokenpass.stats(fast).selected:
        assert mask.shape == (2, prefix + 64)
        assert mask.sum(1).tolist() == [prefix + wanted] * 2
        assert bool(mask[:, :prefix].all())


@pytest.mark.inductor
@pytest.mark.parametrize("options", [{"keep": 0.3}, {"threshold": 0.4}], ids=str)
@torch.no_grad()
def test_inductor_computes_the_same(options: dict[str, float]) -> None:
    """Breaks if functionalisation loses a write into the state."""
    torch.manual_seed(0)
    model = Encoder(1, 2, 16, 1).eval()
    plain, fast = (gated(model, eventful(**options), inner) for inner in ("eager", "inductor"))
    for x in walk(torch.randn(1, 3, 32, 32), 4):
        assert relative_error(fast(x), plain(x)) <= TOLERANCE
