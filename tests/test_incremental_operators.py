"""The operators of updated attention: what they return, declare, cost, and how they compile."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from tests.attention_stream import WAYS, Stream, exchanging, updating
from tokenpass import attention_rows, incremental, native
from tokenpass import torch_internals as internals
from tokenpass.exchange_cost import pairs, pays, refreshed
from tokenpass.gates import FEWEST
from tokenpass.incremental import update_attention


@pytest.mark.parametrize("way", WAYS)
def test_autocast_changes_nothing(way: str) -> None:
    """Breaks if products of the state run in a half precision where a user casts."""
    stream = Stream(tokens=64)
    with exchanging(way), torch.autocast("cpu", torch.bfloat16):
        assert stream.error(stream.full()) <= 1e-5
        assert stream.error(stream.update(stream.some(3))) <= 1e-5


def arguments(stream: Stream, count: int) -> tuple[Any, ...]:
    """Of an update, before it has happened."""
    stream.full()
    changed = stream.some(count)
    rows = [torch.randn_like(attention_rows.take(x, changed)) for x in (stream.query, stream.key)]
    old = stream.put(changed, *rows, attention_rows.take(stream.value, changed))
    parts = (stream.query, stream.key, stream.value, *old, changed, stream.scale, stream.bias)
    return (*parts, *stream.state)


STREAMS: dict[str, Callable[[], Stream]] = {
    "plain": Stream,
    "grouped, two images": lambda: Stream(2, 4, groups=2),
    "masked": lambda: Stream(bias=torch.rand(48, 48) > 0.1),
    "half": lambda: Stream(dtype=torch.bfloat16, value_width=4, bias=torch.randn(2, 1, 48)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_operators_are_sound(name: str) -> None:
    """Breaks if the fake implementation or the declared writes are not what happens."""
    stream = STREAMS[name]()
    inputs = (stream.query, stream.key, stream.value, stream.scale, stream.bias)
    torch.library.opcheck(torch.ops.tokenpass.full_attention.default, (*inputs, *stream.state))
    recompute: Any = torch.ops.tokenpass.recompute_attention.default
    for in_need, left in ((0, 0), (3, 0), (40, 0), (0, 2)):
        given = (*inputs, torch.tensor(in_need), left, *stream.state)
        torch.library.opcheck(recompute, given)


def test_compiled_operator_is_sound() -> None:
    """The same of the one that runs compiled code."""
    stream = Stream(2, 4, groups=2, tokens=128, value_width=4, bias=torch.randn(2, 1, 128))
    for count in (3, 100):
        update: Any = torch.ops.tokenpass.update_by_code.default
        torch.library.opcheck(update, arguments(stream, count))


@pytest.mark.parametrize("way", ["fused", "by code"])
@pytest.mark.parametrize(
    "inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compiled_with_any_number_of_changed_tokens(inner: str, way: str) -> None:
    """Breaks if the state is copied and lost, or if another number compiles anew."""
    graphs = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return torch._dynamo.lookup_backend(inner)(module, inputs)

    @torch.compile(backend=backend)
    def step(*inputs: Any) -> Tensor:
        update_attention(*inputs)
        found: Tensor = inputs[8].transpose(1, 2).flatten(2) + 1.0
        return found

    stream = Stream(tokens=64)
    with exchanging(way), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        # What Dynamo, unlike our own tracing, would look into.
        patch.setattr(native, "available", lambda *tensors: way == "by code")
        stream.full()
        for count in (5, 9, 3, 12):
            changed = stream.some(count)
            old = stream.put(changed, *torch.randn(3, 1, 2, count, 8))
            torch._dynamo.mark_dynamic(changed, 1)
            for x in old:
                torch._dynamo.mark_dynamic(x, 2)
            inputs = (stream.query, stream.key, stream.value, *old, changed, stream.scale, None)
            found = step(*inputs, *stream.state) - 1.0
            assert stream.error(found.unflatten(2, (2, 8)).transpose(1, 2)) <= 1e-5
    assert len(graphs) == 1


@pytest.mark.parametrize("way", ["fused", "by code"])
@pytest.mark.parametrize("count", [32, 64, 512])
@pytest.mark.parametrize("tokens", [100, 512, 1024])
def test_flops_are_those_of_what_runs(tokens: int, count: int, way: str) -> None:
    """Breaks if the formula forgets a part, or follows another rule than the operator."""
    stream, compiled = Stream(tokens=tokens, width=16), way == "by code"
    with updating(way), pytest.MonkeyPatch.context() as patch:
        inputs = arguments(stream, count % tokens)
        patch.setattr(incremental, "DRIFT_LIMIT", torch.inf)
        with FlopCounterMode(display=False) as found:
            update_attention(*inputs)
    query, key, value = inputs[:3]
    count = count % tokens
    compared = pairs(tokens, count, compiled=compiled)
    if compared == tokens**2 and not compiled:  # a few are exchanged in vain
        compared += (3 * FEWEST + refreshed(tokens)) * tokens
    assert found.get_total_flops() == 2 * 2 * compared * (16 + 16)
    with FlopCounterMode(display=False) as whole:
        functional.scaled_dot_product_attention(query, key, value)
    with FlopCounterMode(display=False) as found_whole:
        stream.full()
    assert found_whole.get_total_flops() == whole.get_total_flops()
    less = found.get_total_flops() < whole.get_total_flops()
    assert less == pays(tokens, count, compiled=compiled)


@pytest.mark.parametrize(
    ("compiled", "measured"),
    [
        (False, {196: 0.0, 400: 0.17, 784: 0.21, 1764: 0.24, 4096: 0.25}),
        (True, {196: 0.3, 400: 0.37, 784: 0.44, 1764: 0.50, 4096: 0.45}),
    ],
)
def test_dense_is_chosen_where_it_is_faster(compiled: bool, measured: dict[int, float]) -> None:
    """The break-evens that were measured, within a twentieth of the tokens; breaks on any slip."""
    for tokens, share in measured.items():
        paying = [changed for changed in range(tokens) if pays(tokens, changed, compiled=compiled)]
        assert paying == list(range(len(paying)))
        assert abs(len(paying) / tokens - share) <= 0.05


MEMORY = """
    from pathlib import Path
    import torch
    from tokenpass.incremental import full_attention, update_attention

    def kilobytes(name):
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if name in x]
        return int(line.split()[1])

    def run(tokens, bias):
        parts = [torch.randn(1, 2, tokens, 64) for _ in range(3)]
        state = torch.zeros(1, 2, tokens, 64), torch.zeros(1, 2, tokens), torch.zeros(1, tokens)
        changed = torch.randperm(tokens)[None, :200]
        old = [x.index_select(2, changed[0]) for x in parts[1:]]
        before = kilobytes("VmRSS")
        full_attention(*parts, 0.125, bias, *state)
        update_attention(*parts, *old, changed, 0.125, bias, *state)
        return kilobytes("VmHWM") - before

    torch.set_num_threads(1)
    run(256, None)
    print(run(10_000, {bias}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("bias", ["None", "torch.ones(10_000, 10_000, dtype=torch.bool)"])
def test_no_map_in_memory(bias: str) -> None:
    """The peak beyond inputs and state; a map of float32 takes 800 megabytes, a bias 400."""
    script = textwrap.dedent(MEMORY).format(bias=bias)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 120_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    for bias in (None, torch.rand(64, 64, device="cuda") > 0.2):
        stream = Stream(2, 4, 64, groups=2, bias=bias, device="cuda")
        with exchanging():
            assert stream.error(stream.full()) <= 1e-5
            for _ in range(10):
                assert stream.error(stream.update(stream.some(6))) <= 1e-5


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a machine that cannot compile cannot update attention either."""

    def fails(source: str) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(internals, "cpp_library", fails)
    native._library.cache_clear()
    try:
        stream = Stream(tokens=512)
        assert not native.available(stream.query)
        assert stream.error(stream.full()) <= 1e-5
        assert stream.error(stream.update(stream.some(9))) <= 1e-5
    finally:
        native._library.cache_clear()
