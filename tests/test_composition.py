"""tokenpass beside other parts of torch: backends, modes, training, transforms, copies.

At full budget with ``always_rewrite`` the rewritten graph runs, and the reference is the eager
model.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import tokenpass
from tests import tiny
from tests.tiny import Block, Encoder, images
from tokenpass import HiPrune

FULL = HiPrune(keep=1.0)
HALF = HiPrune(keep=0.5)


def compiled(model: nn.Module, method: HiPrune = FULL, inner: Any = "eager", **more: Any) -> Any:
    backend = tokenpass.backend(method, inner=inner, always_rewrite=True)
    return torch.compile(model, backend=backend, **more)


def close(got: Any, wanted: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# ---------------------------------------------------------------- backends and modes


def test_inner_may_be_a_function() -> None:
    """Breaks if the function gets the original graph, or if what it returns is not what runs."""
    seen: list[fx.GraphModule] = []

    def doubling(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(module)

        def run(*values: Any) -> Any:
            first, *rest = module(*values)
            return (2 * first, *rest)

        return run

    model = tiny.encoder()
    close(compiled(model, inner=doubling)(images()), 2 * model(images()))
    (graph,) = seen
    assert any("tokenpass" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("inner", ["aot_eager", "aot_eager_decomp_partition"])
def test_other_backends(inner: str) -> None:
    model = tiny.encoder()
    close(compiled(model, inner=inner)(images()), model(images()))


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_of_inductor(mode: str) -> None:
    """Breaks if a mode is refused, or changes numbers."""
    model = tiny.encoder()
    fast = torch.compile(model, backend="tokenpass", mode=mode)
    half = compiled(model, HiPrune())
    with torch.no_grad():
        close(fast(images()), half(images()))


# ---------------------------------------------------------------- training


class Classifier(nn.Module):
    """An encoder and a mean over its tokens; blocks may be computed again in the backward pass."""

    def __init__(self, *, again: bool = False, prune: bool = True) -> None:
        super().__init__()
        self.encoder = tiny.encoder(depth=3)
        self.head = nn.Linear(tiny.WIDTH, 4)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        encoder = self.encoder
        x = encoder.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([encoder.prefix.expand(x.shape[0], -1, -1), x], 1) + encoder.table
        for block in encoder.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        out: Tensor = self.head(x.mean(1))
        return out


def steps(model: nn.Module, run: Callable[[Tensor], Tensor], count: int = 4) -> list[float]:
    """Losses of some steps of gradient descent."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    labels, losses = torch.tensor([0, 3, 1, 2]), list[float]()
    for number in range(count):
        loss = nn.functional.cross_entropy(run(images(4) + number / 10), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_training_loop(again: bool, inner: str) -> None:
    """Breaks if gradients are wrong, or if a step sees parameters of the step before."""
    model = Classifier(again=again)
    twin = copy.deepcopy(model)
    fast = compiled(model, inner=inner)
    close(torch.tensor(steps(model, fast)), torch.tensor(steps(twin, twin)))
    for mine, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        close(mine, wanted)
    assert tokenpass.report(fast).converted


def test_training_with_fewer_tokens_reaches_the_encoder() -> None:
    """Breaks if no gradient reaches the encoder through a cut."""
    model = Classifier()
    before = [parameter.clone() for parameter in model.encoder.parameters()]
    losses = steps(model, compiled(model, HALF), count=12)
    assert losses[-1] < losses[0]
    after = model.encoder.parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---------------------------------------------------------------- autocast, transforms, options


def test_autocast_around_the_call() -> None:
    model = tiny.encoder()
    fast = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = fast(images()), model(images())
    assert got.dtype == wanted.dtype
    close(got.float(), wanted.float(), atol=5e-2)


@pytest.mark.slow
def test_parameters_of_another_model() -> None:
    """Breaks if a graph holds the parameters that it was compiled with."""
    model, other = tiny.encoder(), tiny.encoder()
    parameters: dict[str, Tensor] = dict(other.named_parameters())
    own: dict[str, Tensor] = dict(model.named_parameters())

    def call(values: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(model, values, (x,))

    fast = torch.compile(call, backend=tokenpass.backend(FULL, inner="eager", always_rewrite=True))
    for values, wanted in ((own, model), (parameters, other)):
        close(fast(values, images()), wanted(images()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_a_compiled_model() -> None:
    """Breaks if a transform around the model gets other numbers, rewritten or not."""
    model = tiny.encoder()
    stacked = torch.stack([images(2), images(2) + 1])

    def call(x: Tensor) -> Any:
        return torch.vmap(model)(x)

    fast = torch.compile(call, backend=tokenpass.backend(FULL, inner="eager", always_rewrite=True))
    close(fast(stacked), torch.stack([model(x) for x in stacked]))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dynamic": True}, {"fullgraph": True}], ids=str)
def test_options_of_torch_compile(options: dict[str, Any]) -> None:
    model = tiny.encoder()
    fast = compiled(model, **options)
    for count in (2, 3, 5):
        close(fast(images(count)), model(images(count)))
    assert tokenpass.report(fast).converted


def test_the_model_can_still_be_copied_and_pickled() -> None:
    """Breaks if compiling leaves something in the model that cannot be copied."""
    model = tiny.encoder()
    wanted = model(images())
    compiled(model, HALF)(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(twin(images()), wanted, atol=0.0)


def test_two_compiled_models_do_not_meet() -> None:
    """Breaks if the budget or the graph of one is used for the other."""
    models = [Encoder([Block(), Block()]), Encoder([Block(), Block(), Block()])]
    fast = [compiled(models[0], FULL), compiled(models[1], HALF)]
    for _ in range(2):
        close(fast[0](images()), models[0](images()))
        fast[1](images())
    assert tokenpass.kept(fast[0]).shape[1] == tiny.TOKENS
    assert tokenpass.kept(fast[1]).shape[1] == tiny.TOKENS // 2


# ---------------------------------------------------------------- quantised weights


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_quantised_weights(keep: float) -> None:
    """Breaks if a weight in int8 is taken for another kind of value."""
    quantisation = pytest.importorskip("torchao.quantization")
    model = tiny.encoder(depth=4)
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    rounded = copy.deepcopy(model)
    for layer in rounded.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    fast, wanted = (compiled(m, HiPrune(keep=keep)) for m in (model, rounded))
    with torch.no_grad():
        close(fast(images()), wanted(images()))
        if keep == 1.0:
            close(fast(images()), model(images()))
    assert tokenpass.report(fast).converted
