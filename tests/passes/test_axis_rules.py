"""The rules of the axis analysis claim nothing that is not so.

Each operation is traced, and each claim about it (:mod:`tests.soundness`) is held against its
numbers: a rule that forgets an axis in ``mixed``, names a dimension of the result after the wrong
one, or lines a table up with the wrong dimension fails here. Every operation runs twice, with sizes
that are all different and with sizes that are all equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.captured import Apply, trace
from tests.soundness import violations

Constants = dict[str, Tensor]
Case = tuple[Callable[..., Any], Callable[[int, int, int], Constants]]


def none(batch: int, tokens: int, channels: int) -> Constants:
    return {}


def rand(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def square(batch: int, tokens: int, channels: int) -> Constants:
    return {"weight": rand(channels, channels), "bias": rand(channels)}


def table(batch: int, tokens: int, channels: int) -> Constants:
    return {"table": rand(tokens, channels), "prefix": rand(1, 1, channels)}


def looked_up(batch: int, tokens: int, channels: int) -> Constants:
    return {
        "rows": torch.arange(tokens).flip(0),
        "columns": torch.zeros(tokens, 1, dtype=torch.int64),
        "biases": rand(5, tokens),
        "pairs": torch.arange(tokens * tokens).reshape(tokens, tokens) % 5,
        "elsewhere": torch.zeros(1, tokens, channels, dtype=torch.int64),
    }


def heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    split = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return split, split.roll(1, -1), split * 2


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def with_prefix(x: Tensor, m: Any) -> Tensor:
    return torch.cat([m.prefix.expand(x.shape[0], -1, -1), x], 1)


TOKENS: dict[str, Case] = {
    "linear": (lambda x, m: functional.linear(x, m.weight, m.bias), square),
    "matmul": (lambda x, m: x @ m.weight, square),
    "vector": (lambda x, m: x @ m.bias, square),
    "left": (lambda x, m: m.weight @ x.transpose(1, 2), square),
    "scores": (lambda x, m: x @ x.transpose(-1, -2), none),
    "gram": (lambda x, m: x.transpose(-1, -2) @ x, none),
    "bmm": (lambda x, m: torch.bmm(x, x.transpose(1, 2)), none),
    "baddbmm": (lambda x, m: torch.baddbmm(x @ x.mT, x, x.mT, alpha=0.5), none),
    "addmm": (lambda x, m: torch.addmm(m.bias, x[0], m.weight), square),
    "mm": (lambda x, m: torch.mm(x[0], m.weight), square),
    "einsum": (lambda x, m: torch.einsum("bnc,bmc->bnm", x, x), none),
    "einsum of a table": (lambda x, m: torch.einsum("bnc,nc->bc", x, m.table), table),
    "outer": (lambda x, m: torch.outer(x[0, :, 0], m.bias), square),
    "attention": (lambda x, m: functional.scaled_dot_product_attention(*heads(x)), none),
    "attention with a mask": (
        lambda x, m: functional.scaled_dot_product_attention(
            *heads(x), attn_mask=m.table @ m.table.T
        ),
        table,
    ),
    "grouped attention": (lambda x, m: grouped(*heads(x)), none),
    "cross attention": (
        lambda x, m: functional.scaled_dot_product_attention(m.prefix, x, x),
        table,
    ),
    "softmax of channels": (lambda x, m: x.softmax(-1), none),
    "softmax of tokens": (lambda x, m: x.softmax(1), none),
    "log softmax": (lambda x, m: functional.log_softmax(x, 1), none),
    "layer norm": (
        lambda x, m: functional.layer_norm(x, x.shape[-1:], m.bias, m.bias),
        square,
    ),
    "layer norm of tokens": (lambda x, m: functional.layer_norm(x, x.shape[1:]), none),
    "rms norm": (lambda x, m: functional.rms_norm(x, x.shape[-1:], m.bias), square),
    "batch norm": (
        lambda x, m: functional.batch_norm(x.mT, m.bias, m.bias.abs(), m.bias, m.bias),
        square,
    ),
    "group norm": (lambda x, m: functional.group_norm(x.mT, 2, m.bias, m.bias), square),
    "instance norm": (lambda x, m: functional.instance_norm(x.mT), none),
    "gelu": (lambda x, m: functional.gelu(x), none),
    "glu": (lambda x, m: functional.glu(x, -1), none),
    "prelu": (lambda x, m: functional.prelu(x.mT, m.bias), square),
    "where": (lambda x, m: torch.where(m.table > 0, x, m.table), table),
    "masked fill": (lambda x, m: x.masked_fill(m.table > 0, 0.0), table),
    "addcmul": (lambda x, m: torch.addcmul(x, m.bias, x, value=0.5), square),
    "maximum of two": (lambda x, m: torch.max(x, m.table), table),
    "minimum of two": (lambda x, m: torch.min(x, m.table), table),
    "table": (lambda x, m: x + m.table, table),
    "table of other tokens": (lambda x, m: x + x.flip(1), none),
    "batch meets tokens": (lambda x, m: x.mean(1, keepdim=True) + x.mean(0), none),
    "clamp by a table": (lambda x, m: x.clamp(min=m.table), table),
    "complex": (
        lambda x, m: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)))),
        none,
    ),
    "reshape": (lambda x, m: x.reshape(x.shape[0] * x.shape[1], -1), none),
    "flatten": (lambda x, m: x.flatten(1), none),
    "unflatten": (lambda x, m: x.unflatten(-1, (2, -1)), none),
    "mixing reshape": (lambda x, m: x.reshape(x.shape[0], x.shape[2], x.shape[1]), none),
    "permute": (lambda x, m: x.permute(2, 0, 1), none),
    "transpose": (lambda x, m: x.transpose(0, -1), none),
    "movedim": (lambda x, m: x.movedim(1, 0), none),
    "swapaxes": (lambda x, m: x.swapaxes(0, 1), none),
    "squeeze": (lambda x, m: x.unsqueeze(1).squeeze(), none),
    "expand": (lambda x, m: x.unsqueeze(1).expand(-1, 3, -1, -1), none),
    "expand as": (lambda x, m: x[:, :1].expand_as(x), none),
    "repeat": (lambda x, m: x.repeat(1, 2, 1), none),
    "repeat interleave": (lambda x, m: x.repeat_interleave(2, 1), none),
    "tile": (lambda x, m: x.tile(2, 1, 1), none),
    "roll": (lambda x, m: x.roll(1, 1), none),
    "roll and back": (lambda x, m: x.roll((2, 1), (1, 2)).roll((-2, -1), (1, 2)), none),
    "flat roll": (lambda x, m: x.roll(1), none),
    "flip": (lambda x, m: x.flip(1), none),
    "cat": (with_prefix, table),
    "cat and slice": (lambda x, m: with_prefix(x, m)[:, 1:], table),
    "class token": (lambda x, m: with_prefix(x, m)[:, 0], table),
    "last token": (lambda x, m: with_prefix(x, m)[:, -1], table),
    "cut inside a part": (lambda x, m: with_prefix(x, m)[:, 2:], table),
    "every second from one": (lambda x, m: x[:, 1::2] * 2, none),
    "every second channel": (lambda x, m: torch.cat([x[..., ::2], x[..., 1::2]], -1), none),
    "slices and cat": (lambda x, m: torch.cat([x[:, :2], x[:, 2:]], 1), none),
    "halves swapped": (lambda x, m: torch.cat([x[:, 2:], x[:, :2]], 1), none),
    "every second": (lambda x, m: x[:, ::2], none),
    "cat of batches": (lambda x, m: torch.cat([x, x.flip(1)], 0), none),
    "chunk": (lambda x, m: x.chunk(2, -1), none),
    "split": (lambda x, m: x.split(2, 1), none),
    "tensor split": (lambda x, m: torch.tensor_split(x, 3, 1), none),
    "unbind": (lambda x, m: x.unflatten(-1, (2, -1)).unbind(2), none),
    "stack": (lambda x, m: torch.stack([x, x * 2], 2), none),
    "narrow": (lambda x, m: x.narrow(1, 1, 2), none),
    "pad": (lambda x, m: functional.pad(x, (1, 0, 0, 2)), none),
    "reflect": (lambda x, m: functional.pad(x, (0, 1), mode="reflect"), none),
    "cropping pad": (lambda x, m: functional.pad(x, (0, 0, -1, 1)), none),
    "mean": (lambda x, m: x.mean(1), none),
    "mean of all": (lambda x, m: x.mean(), none),
    "sum": (lambda x, m: x.sum(-1, keepdim=True), none),
    "largest": (lambda x, m: x.amax(1), none),
    "largest with place": (lambda x, m: x.max(1).values, none),
    "variance": (lambda x, m: torch.var_mean(x, -1), none),
    "standard deviation": (lambda x, m: x.std(), none),
    "vector norm": (lambda x, m: functional.normalize(x, dim=1), none),
    "norm": (lambda x, m: x.norm(), none),
    "logsumexp": (lambda x, m: x.logsumexp(1), none),
    "cumsum": (lambda x, m: x.cumsum(1), none),
    "index select": (lambda x, m: x.index_select(1, m.rows), looked_up),
    "index": (lambda x, m: x[:, m.rows], looked_up),
    "index pairs": (lambda x, m: x[:, m.rows[:, None], m.columns[None, :, 0]], looked_up),
    "index apart": (lambda x, m: x[m.columns[:, 0], :, m.columns[:, 0]], looked_up),
    "gather by itself": (lambda x, m: x.gather(1, x.argsort(1)), none),
    "gather by a constant": (lambda x, m: x.gather(1, m.elsewhere), looked_up),
    "take along": (lambda x, m: x.take_along_dim(m.rows[None, :, None], 1), looked_up),
    "relative biases": (
        lambda x, m: x @ x.mT + m.biases[m.pairs.flatten()].view(*m.pairs.shape, -1)[..., 0],
        looked_up,
    ),
    "biases of tokens": (lambda x, m: x + m.biases[:1].mT, looked_up),
    "embedding": (lambda x, m: functional.embedding(x.argmax(-1) % 5, m.biases), looked_up),
    "one hot": (lambda x, m: functional.one_hot(x.argmax(-1), x.shape[-1]) * x, none),
    "meshgrid": (lambda x, m: torch.meshgrid(x[0, 0], m.bias, indexing="xy"), square),
    "windows of tokens": (lambda x, m: x.unfold(1, 2, 1), none),
    "sort": (lambda x, m: x.sort(1).values, none),
    "largest few": (lambda x, m: x.topk(2, 1).values, none),
    "fourier": (lambda x, m: torch.fft.fft(x, dim=1).real, none),
    "write": (lambda x, m: x.clone().index_fill_(1, m.rows[:1], 0.0), looked_up),
    "cdist": (lambda x, m: torch.cdist(x, x), none),
}


def kernel(height: int, width: int, channels: int) -> Constants:
    return {
        "weight": rand(4, channels, 3, 3),
        "one": rand(4, channels, 1, 1),
        "depthwise": rand(channels, 1, 3, 3),
        "point": rand(channels, 1, 1, 1),
        "grouped": rand(4, channels // 2, 3, 3),
        "transposed": rand(channels, 4, 2, 2),
        "line": rand(4, channels, 3),
        "patch": rand(4, channels, 2, 2),
    }


def windows(x: Tensor, side: int) -> Tensor:
    split: Tensor = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return split.permute(0, 2, 4, 3, 5, 1)


IMAGES: dict[str, Case] = {
    "convolution": (lambda x, m: functional.conv2d(x, m.weight, padding=1), kernel),
    "same": (lambda x, m: functional.conv2d(x, m.weight, padding="same"), kernel),
    "strided": (lambda x, m: functional.conv2d(x, m.patch, stride=2), kernel),
    "one by one": (lambda x, m: functional.conv2d(x, m.one), kernel),
    "one by one apart": (
        lambda x, m: functional.conv2d(x[..., :4, :4], m.one, stride=2, padding=2),
        kernel,
    ),
    "depthwise": (
        lambda x, m: functional.conv2d(x, m.depthwise, padding=1, groups=x.shape[1]),
        kernel,
    ),
    "scale": (lambda x, m: functional.conv2d(x, m.point, groups=x.shape[1]), kernel),
    "grouped": (lambda x, m: functional.conv2d(x, m.grouped, groups=2), kernel),
    "transposed": (lambda x, m: functional.conv_transpose2d(x, m.transposed, stride=2), kernel),
    "of one dimension": (lambda x, m: functional.conv1d(x.flatten(2), m.line), kernel),
    "average pool": (lambda x, m: functional.avg_pool2d(x, 2), none),
    "largest pool": (lambda x, m: functional.max_pool2d(x, 3, stride=1, padding=1), none),
    "global pool": (lambda x, m: functional.adaptive_avg_pool2d(x, 1), none),
    "resize": (lambda x, m: functional.interpolate(x, scale_factor=2.0, mode="bilinear"), none),
    "nearest": (lambda x, m: functional.interpolate(x, size=(3, 3)), none),
    "unfold": (lambda x, m: functional.unfold(x, 2, stride=2), none),
    "shuffle": (lambda x, m: functional.pixel_shuffle(x, 2), none),
    "unshuffle": (lambda x, m: functional.pixel_unshuffle(x, 2), none),
    "patches": (lambda x, m: functional.conv2d(x, m.patch, stride=2).flatten(2).mT, kernel),
    "windows": (lambda x, m: windows(x, 2).flatten(3, 4).flatten(0, 2).softmax(-1), none),
    "attention in windows": (
        lambda x, m: (lambda w: (w @ w.mT).softmax(-1) @ w)(windows(x, 2).flatten(3, 4)),
        none,
    ),
    "a window": (lambda x, m: windows(x, 2)[:, 0], none),
    "shifted": (lambda x, m: windows(x.roll((-1, -1), (2, 3)), 2).sum(-1), none),
    "local norm": (lambda x, m: functional.group_norm(x, 1), none),
}

SIZES = {"different": (2, 6, 8), "equal": (4, 4, 4)}
IMAGE_SIZES = {"different": (2, 4, 6, 8), "equal": (4, 4, 4, 4)}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", TOKENS)
def test_claims_about_tokens_hold(name: str, sizes: tuple[int, int, int]) -> None:
    function, constants = TOKENS[name]
    found = trace(Apply(function, **constants(*sizes)), rand(*sizes))
    assert violations(found) == []


@pytest.mark.parametrize("sizes", IMAGE_SIZES.values(), ids=IMAGE_SIZES)
@pytest.mark.parametrize("name", IMAGES)
def test_claims_about_images_hold(name: str, sizes: tuple[int, int, int, int]) -> None:
    function, constants = IMAGES[name]
    _, channels, height, width = sizes
    module = Apply(function, **constants(height, width, channels))
    assert violations(trace(module, rand(*sizes))) == []
