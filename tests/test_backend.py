"""The backend by name and typed: every acceptance model is converted, bad options are refused."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import nn

import tokenpass
from tests.zoo import BY_NAME, DEPTH, DIFFERENT, Entry, relative_error, tensors

TOKENS = 64
HALF: dict[str, Any] = {"keep": 0.5, "inner": "eager"}


@pytest.fixture
def model() -> nn.Module:
    return BY_NAME["timm/vit_tiny_patch16_224"].build()


@pytest.fixture
def images() -> torch.Tensor:
    return BY_NAME["timm/vit_tiny_patch16_224"].images(2)


@pytest.mark.parametrize("entry", DIFFERENT)
def test_every_model_is_converted(entry: Entry) -> None:
    """Breaks if a spelling of attention, a table along the tokens or a head is not understood."""
    model = entry.build()
    fast = torch.compile(model, backend="tokenpass", options=HALF, dynamic=False)
    for batch in (1, 3):
        images = entry.images(batch)
        with torch.no_grad():
            found, expected = fast(images), model(images)
        assert [x.shape for x in tensors(found)] == [x.shape for x in tensors(expected)]
        assert all(torch.isfinite(x).all() for x in tensors(found))
        assert tokenpass.kept(fast).shape == (batch, TOKENS // 2)
        report = tokenpass.report(fast)
        assert report.converted
        assert len(report.attentions) >= DEPTH
        assert len(report.blocks) == DEPTH
        assert report.flops < report.flops_before


@pytest.mark.slow
def test_no_import_is_needed() -> None:
    """Breaks if the entry point is not declared, or does work only after an import."""
    code = """
        import sys, torch
        from torch import nn
        assert "tokenpass" not in sys.modules
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        stem = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.Flatten(2))
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.layers = stem, nn.ModuleList([layer] * 3)
            def forward(self, x):
                x = self.stem(x).transpose(1, 2)
                for layer in self.layers:
                    x = layer(x)
                return x.mean(1)
        model = Model().eval()
        fast = torch.compile(model, backend="tokenpass", options={"keep": 0.5, "inner": "eager"})
        with torch.no_grad():
            assert fast(torch.randn(2, 3, 32, 32)).shape == (2, 32)
        import tokenpass
        assert tokenpass.kept(fast).shape == (2, 32)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kep": 0.5}, ["'kep'", "'keep'", "'inner'", "'always_rewrite'"]),
        ({"method": "tome"}, ["'tome'", "'hiprune'"]),
        ({"method": 3}, ["3", "'hiprune'"]),
        ({"keep": 0.0}, ["keep=0.0", "(0, 1]"]),
        ({"keep": 1.5}, ["keep=1.5", "(0, 1]"]),
        ({"keep": 0}, ["keep=0", "at least 1"]),
        ({"keep": True}, ["keep=True"]),
        ({"keep": float("nan")}, ["keep=nan"]),
        ({"alpha": 2.0}, ["alpha=2.0", "[0, 1]"]),
        ({"where": "middle"}, ["'middle'", "'encoder'", "'output'"]),
        ({"dropped": "lost"}, ["'lost'", "'merge'", "'discard'"]),
        ({"output": "cut"}, ["'cut'", "'restored'", "'pruned'"]),
        ({"compat": "llama"}, ["'llama'", "'llava'", "'qwen'"]),
        ({"compat": "llava"}, ['where="output"']),
        ({"compat": "qwen", "where": "output"}, ["tokenpass.select"]),
        ({"object_layer": 0}, ["object_layer=0"]),
        ({"object_layer": 9}, ["object_layer=9", "4 blocks"]),
        ({"stages": [(3, 0.5), (2, 0.25)]}, ["stages", "rise"]),
        ({"stages": [(2, 0.5)], "where": "output"}, ["stages", "contradict"]),
        ({"stages": [(2, 0.5)], "keep": 0.25}, ["keep=0.25", "contradicts"]),
        ({"stages": [(9, 0.5)]}, ["stages[0]=9", "4 blocks"]),
        ({"inner": "inductr"}, ["'inductr'", "'inductor'", "'eager'"]),
        ({"inner": "tokenpass"}, ["another backend"]),
        ({"always_rewrite": "yes"}, ["always_rewrite='yes'", "True or False"]),
    ],
    ids=str,
)
def test_bad_options_name_the_choices(
    model: nn.Module, images: torch.Tensor, options: dict[str, Any], named: list[str]
) -> None:
    """Breaks if an option is ignored, or refused without saying what would do."""
    fast = torch.compile(model, backend="tokenpass", options={"inner": "eager", **options})
    with pytest.raises(ValueError, match=r".") as caught:
        fast(images)
    assert isinstance(caught.value, tokenpass.OptionError)
    for text in named:
        assert text in str(caught.value)


def test_typed_and_named_are_the_same(model: nn.Module, images: torch.Tensor) -> None:
    """Breaks if one of the two ways drops a field."""
    method = tokenpass.HiPrune(keep=0.4, alpha=0.5, dropped="discard")
    named: dict[str, Any] = {"method": "hiprune", "keep": 0.4, "alpha": 0.5, "dropped": "discard"}
    typed = torch.compile(model, backend=tokenpass.backend(method, inner="eager"))
    by_name = torch.compile(model, backend="tokenpass", options={**named, "inner": "eager"})
    with torch.no_grad():
        assert torch.equal(typed(images), by_name(images))
    assert torch.equal(tokenpass.kept(typed), tokenpass.kept(by_name))


def test_full_budget_is_the_untouched_graph(model: nn.Module, images: torch.Tensor) -> None:
    """Breaks if a user pays for gathers that keep everything."""
    graphs: list[torch.fx.GraphModule] = []

    def inner(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module)
        return module.forward

    fast = torch.compile(model, backend=tokenpass.backend(tokenpass.HiPrune(keep=1.0), inner=inner))
    with torch.no_grad():
        assert torch.equal(fast(images), model(images))
    targets = {str(node.target) for node in graphs[0].graph.nodes}
    assert not any("tokenpass" in target for target in targets)
    assert not tokenpass.report(fast).converted
    assert tokenpass.kept(fast).tolist() == [list(range(TOKENS))] * 2


def test_nothing_to_convert_compiles_with_a_warning() -> None:
    """Breaks if a model without attention crashes, or is passed on in silence."""
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    fast = torch.compile(model, backend="tokenpass", options=HALF)
    x = torch.randn(2, 8)
    with pytest.warns(tokenpass.TokenpassWarning, match="nothing to convert"):
        found = fast(x)
    assert torch.equal(found, model(x))
    assert not tokenpass.report(fast).converted
    assert tokenpass.report(fast).refusals


def test_pruning_that_would_cost_more_is_refused(model: nn.Module, images: torch.Tensor) -> None:
    """Breaks if the cost model does not veto a late cut of a single token."""
    options: dict[str, Any] = {"stages": [(4, 63)], "inner": "eager"}
    fast = torch.compile(model, backend="tokenpass", options=options)
    with pytest.warns(tokenpass.TokenpassWarning, match="would not pay"), torch.no_grad():
        found = fast(images)
    with torch.no_grad():
        assert torch.equal(found, model(images))


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/eva02_tiny_patch14_224"])
def test_inductor_computes_the_same(name: str) -> None:
    """Breaks if the rewritten graph means something else to Inductor than to eager."""
    entry = BY_NAME[name]
    model, images = entry.build(), entry.images(2)
    eager = torch.compile(model, backend="tokenpass", options=HALF)
    half: dict[str, Any] = {"keep": 0.5}
    fast = torch.compile(model, backend="tokenpass", options=half)
    with torch.no_grad():
        assert relative_error(fast(images), eager(images)) <= 1e-5
    assert torch.equal(tokenpass.kept(fast), tokenpass.kept(eager))


@pytest.mark.inductor
def test_inductor_trains_through_a_cut(model: nn.Module, images: torch.Tensor) -> None:
    """Breaks if the rewritten graph has no gradient under AOTAutograd."""
    gradients = []
    for inner in ("eager", "inductor"):
        model.zero_grad()
        options: dict[str, Any] = {"keep": 0.5, "inner": inner}
        torch.compile(model, backend="tokenpass", options=options)(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    scale = max(float(g.abs().max()) for g in gradients[0])
    for expected, found in zip(*gradients, strict=True):
        assert float((expected - found).abs().max()) <= 1e-4 * scale
