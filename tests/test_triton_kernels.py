"""The kernels for GPUs, run by Triton's interpreter, against dense evaluations in float64.

Breaks if a tile is skipped or counted twice at the borders, a stride or a mask is read in the wrong
order, or equal candidates are told apart in another order. Nothing here needs a GPU, and none is
used: the interpreter is switched on before Triton is imported, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.house.test_layers import ROOT

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

CASES = """
import itertools, torch
from tokenpass import kernels, triton_kernels as fast

torch.manual_seed(0)

def dense(q, k, scale, bias, mask):
    scores = q.double() @ k.double().transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias.double()[:, None, None]
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    return scores.softmax(-1).mean((1, 2))

def masks(images, heads, queries, keys):
    yield None
    for shape in ((1, 1, queries, keys), (images, 1, 1, keys), (1, heads, queries, keys)):
        yield torch.randn(shape)
        seen = torch.rand(shape) > 0.4
        seen[..., 0] = True
        yield seen

# Triton's interpreter does not support arithmetic in bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
count = 0
for (queries, keys, width), dtype in itertools.product(
    ((1, 1, 8), (5, 70, 16), (65, 64, 24), (130, 67, 64)), TOLERANCE
):
    images, heads = 2, 3
    q, k = torch.randn(images, queries, heads, width), torch.randn(images, keys, heads, width)
    q, k = q.transpose(1, 2).to(dtype), k.transpose(1, 2).to(dtype)
    for number, mask in enumerate(masks(images, heads, queries, keys)):
        if mask is not None and dtype != torch.float32:
            continue
        for bias in (None, torch.rand(images, keys).log1p()):
            found = fast.attention_received(q, k, width**-0.5, bias, mask)
            expected = dense(q, k, width**-0.5, bias, mask)
            error = float((found - expected).abs().max() / expected.abs().max())
            assert error <= TOLERANCE[dtype], (queries, keys, width, dtype, number, error)
            count += 1
assert count > 40

for shape in ((1, 1, 1, 8), (2, 70, 65, 12), (1, 3, 130, 100)):
    images, tokens, others, channels = shape
    a, b = torch.randn(images, tokens, channels), torch.randn(images, others, channels)
    similarity = torch.nn.functional.cosine_similarity
    cosine = similarity(a.double()[:, :, None], b.double()[:, None], dim=-1)
    chosen = cosine.gather(2, fast.most_similar(a, b)[..., None])[..., 0]
    assert float((cosine.amax(-1) - chosen).max()) <= 1e-6, shape

axes = torch.eye(4)
among = torch.stack([axes[[2, 1, 1, 3, 3, 1]], 5 * axes[[3, 3, 1, 1, 2, 2]]])
assert fast.most_similar(axes[None, 1:].repeat(2, 1, 1), among).tolist() == [[1, 0, 3], [2, 4, 0]]
assert fast.most_similar(torch.zeros(2, 1, 4), among).tolist() == [[0], [0]]
many = torch.ones(1, 200, 4)
assert fast.most_similar(torch.ones(1, 1, 4), many).tolist() == [[0]]
print("all held")
"""


@needs_triton
@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CASES], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "all held\n"


@pytest.mark.slow
def test_triton_is_not_imported_without_a_gpu() -> None:
    """Breaks if tensors of a CPU, or the package itself, need Triton; torch's counter may."""
    script = (
        "import sys, torch.utils.flop_counter; before = 'triton' in sys.modules\n"
        "import tokenpass\n"
        "from tokenpass.kernels import attention_received\n"
        "x = torch.randn(1, 2, 5, 8)\n"
        "attention_received(x, x, 1.0, None, None)\n"
        "print(before, 'triton' in sys.modules, 'tokenpass.triton_kernels' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, after, kernels = done.stdout.split()
    assert before == after
    assert kernels == "False"


@pytest.mark.gpu
@needs_triton
def test_kernels_on_a_gpu() -> None:
    """Breaks if the compiled kernels differ from the composition of ATen operations."""
    import torch

    from tokenpass import kernels

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    query, key = (torch.randn(2, 6, 197, 64, device="cuda") for _ in range(2))
    bias = torch.rand(2, 197, device="cuda")
    found = kernels.attention_received(query, key, 0.125, bias, None)
    expected = kernels.composed_attention_received(
        query.double(), key.double(), 0.125, bias.double(), None
    )
    assert torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-7)
