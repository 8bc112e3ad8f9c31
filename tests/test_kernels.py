"""The custom operators against dense evaluations in float64, and what they cost.

Breaks if a block of rows or maps is skipped or counted twice, a mask or a bias lands on other keys,
the mean runs over anything but heads and queries, a formula miscounts, or a whole map is stored.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenpass import kernels

received: Any = torch.ops.tokenpass.attention_received
similar: Any = torch.ops.tokenpass.most_similar

TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}
"""Relative to the largest value; half precisions round the scores."""

MASK_SHAPES = [(1, 1, 1, 1), (0, 0, 1, 1), (0, 1, 0, 1), (1, 1, 0, 1), (1, 0, 1, 1)]
"""Which of images, heads, queries and keys a mask has; the others are broadcast."""


def dense_received(
    query: Tensor, key: Tensor, scale: float, key_bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    scores = query.double() @ key.double().transpose(-2, -1) * scale
    if key_bias is not None:
        scores = scores + key_bias.double()[:, None, None, :]
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    return scores.softmax(-1).mean((1, 2))


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Any, ...]:
    images, heads, width = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), 8)
    queries, keys = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dtype = draw(st.sampled_from(list(TOLERANCES)))
    bias = normal(images, keys).exp().log1p() if draw(st.booleans()) else None
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    has = draw(st.sampled_from(MASK_SHAPES))
    sizes = (images, heads, queries, keys)
    values = normal(*(size if own else 1 for size, own in zip(sizes, has, strict=True)))
    mask = {"none": None, "bool": values > 0, "float": values.to(dtype)}[kind]
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True
    query, key = normal(images, heads, queries, width), normal(images, heads, keys, width)
    return query.to(dtype), key.to(dtype), width**-0.5, bias, mask


@given(
    arguments=attentions(),
    block_bytes=st.sampled_from([1, 400, 3000, kernels.BLOCK_BYTES]),
    block_rows=st.sampled_from([1, 7, kernels.BLOCK_ROWS]),
)
def test_attention_received(arguments: tuple[Any, ...], block_bytes: int, block_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK_BYTES", block_bytes)
        patch.setattr(kernels, "BLOCK_ROWS", block_rows)
        found = received(*arguments)
    assert found.dtype == torch.float32
    assert close(found, dense_received(*arguments), TOLERANCES[arguments[0].dtype])
    assert torch.allclose(found.sum(1), torch.ones(len(found)), atol=1e-5)


@pytest.mark.parametrize("queries", [1, 1031])
@pytest.mark.parametrize(("images", "heads", "keys"), [(1, 3, 1031), (3, 2, 197)])
def test_attention_received_in_blocks_of_the_real_size(
    images: int, heads: int, keys: int, queries: int
) -> None:
    query, key = torch.randn(images, heads, queries, 16), torch.randn(images, heads, keys, 16)
    sizes = torch.randint(1, 9, (images, keys)).log()
    arguments = (query, key, 0.25, sizes, None)
    assert close(received(*arguments), dense_received(*arguments), 1e-6)


def test_attention_received_of_views() -> None:
    joint = torch.randn(2, 29, 3, 4, 8)
    query, key, _ = joint.permute(2, 0, 3, 1, 4)
    assert close(
        received(query, key, 0.3, None, None), dense_received(query, key, 0.3, None, None), 1e-6
    )


@given(
    images=st.integers(1, 3),
    count=st.integers(1, 50),
    others=st.integers(1, 50),
    dtype=st.sampled_from(list(TOLERANCES)),
    block_bytes=st.sampled_from([1, 1000, kernels.BLOCK_BYTES]),
    seed=st.integers(0, 2**31),
)
def test_most_similar(
    images: int, count: int, others: int, dtype: torch.dtype, block_bytes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, among = (
        (torch.randn(images, n, 12, generator=generator) * 3 + 1).to(dtype) for n in (count, others)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK_BYTES", block_bytes)
        found = similar(tokens, among)
    cosines = torch.nn.functional.cosine_similarity(
        tokens.double()[:, :, None], among.double()[:, None], dim=-1
    )
    assert found.dtype == torch.int64
    assert found.shape == (images, count)
    chosen = cosines.gather(2, found[..., None])[..., 0]
    assert bool((cosines.amax(-1) - chosen <= TOLERANCES[dtype]).all())


def test_of_equally_similar_tokens_the_first() -> None:
    axes = torch.eye(4)
    among = torch.stack([axes[[2, 1, 1, 3, 3, 1]], 5 * axes[[3, 3, 1, 1, 2, 2]]])
    assert similar(axes[None, 1:].repeat(2, 1, 1), among).tolist() == [[1, 0, 3], [2, 4, 0]]
    assert similar(torch.zeros(2, 1, 4), among).tolist() == [[0], [0]]


def test_length_does_not_count() -> None:
    tokens, among = torch.randn(2, 30, 8), torch.randn(2, 20, 8)
    stretched = among * torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0]).repeat(4)[:, None]
    assert torch.equal(similar(tokens, among), similar(tokens, stretched))


Q, K = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 11, 8)
CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "plain": (received, (Q, K, 0.5, None, None)),
    "biased": (received, (Q, K, 0.5, torch.randn(2, 11), None)),
    "bool mask": (received, (Q, K, 0.5, None, torch.ones(9, 11, dtype=torch.bool))),
    "float mask": (received, (Q, K, 0.5, None, torch.randn(3, 9, 11))),
    "half": (received, (Q.bfloat16(), K.bfloat16(), 0.5, torch.randn(2, 11), None)),
    "similar": (similar, (torch.randn(2, 9, 8), torch.randn(2, 4, 8))),
    "similar half": (similar, (torch.randn(2, 9, 8).half(), torch.randn(2, 4, 8).half())),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_are_sound(name: str) -> None:
    operator, arguments = CALLS[name]
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("name", CALLS)
def test_flops_are_those_of_the_dense_product(name: str) -> None:
    operator, arguments = CALLS[name]
    first, second = arguments[:2]
    with FlopCounterMode(display=False) as found:
        operator(*arguments)
    with FlopCounterMode(display=False) as expected:
        _ = first @ second.transpose(-2, -1)
    assert found.get_total_flops() == expected.get_total_flops()


MEMORY = """
    from pathlib import Path
    import torch
    import tokenpass

    def kilobytes(name):
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if name in x]
        return int(line.split()[1])

    torch.set_num_threads(1)
    operator = torch.ops.tokenpass.{operator}
    small = [torch.randn(shape[:-2] + (64, shape[-1])) for shape in {shapes}]
    operator(*small, *{rest})
    large = [torch.randn(shape) for shape in {shapes}]
    before = kilobytes("VmRSS")
    result = operator(*large, *{rest})
    print(kilobytes("VmHWM") - before)
"""

LARGE = {
    "attention_received": ([(1, 12, 16384, 64)] * 2, (0.125, None, None), 200),
    "most_similar": ([(1, 8192, 384)] * 2, (), 50),
}
"""Shapes, other arguments and megabytes allowed; an ``N x N`` map takes 1024 and 256."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("operator", LARGE)
def test_no_whole_map_in_memory(operator: str) -> None:
    """The process's peak beyond what it held before the call, inputs included."""
    shapes, rest, megabytes = LARGE[operator]
    script = textwrap.dedent(MEMORY).format(operator=operator, shapes=shapes, rest=rest)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= megabytes * 1000


def test_flops_of_attention_are_counted_on_every_device() -> None:
    """Breaks if the CPU's fused attention is left out, as in torch 2.13 itself, or raises."""
    query = torch.randn(2, 3, 16, 8)
    counts = []
    for backends in ([SDPBackend.FLASH_ATTENTION], [SDPBackend.MATH]):
        with torch.no_grad(), sdpa_kernel(backends), FlopCounterMode(display=False) as counter:
            functional.scaled_dot_product_attention(query, query, query)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 2 * 3 * 16 * 16 * 8
