"""``tokenpass.rewrite``: exported programs with fewer tokens.

References are the eager model at full budget, and the compiled model, which other tests hold to a
reference of its own, at others.
"""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import tokenpass
from tests import tiny
from tests.tiny import Block, Encoder, images
from tokenpass import Eventful, HiPrune
from tokenpass.errors import OptionError, TokenpassWarning

METHODS = {
    "merged": HiPrune(keep=0.5),
    "discarded": HiPrune(keep=0.5, dropped="discard"),
    "cut inside": HiPrune(keep=0.5, output="pruned"),
    "output": HiPrune(keep=5, where="output"),
}


class Everything(nn.Module):
    """Buffers, lifted constants, two outputs, regions of autocast and without gradients."""

    shift: Tensor

    def __init__(self, cast: bool = True) -> None:
        super().__init__()
        self.encoder = tiny.encoder(depth=4)
        self.register_buffer("shift", torch.randn(tiny.WIDTH))
        self.factor = torch.randn(1)
        self.cast = cast

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.cast):
            z = self.encoder(x)
        with torch.no_grad():
            double = z * 2
        return {"z": z.float() + self.shift * self.factor + torch.tensor(2.0), "double": double}


def exported(model: nn.Module, batch: int | None = None, **options: Any) -> ExportedProgram:
    """A program for a number of images, or for any."""
    dynamic = {"x": {0: Dim("batch")}} if batch is None else None
    return export(model, (images(batch or 2),), dynamic_shapes=dynamic, **options)


def compiled(model: nn.Module, method: HiPrune) -> Any:
    backend = tokenpass.backend(method, inner="eager", always_rewrite=True)
    return torch.compile(model, backend=backend)


def operators(program: ExportedProgram) -> set[str]:
    graphs = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    return {str(n.target) for graph in graphs for n in graph.nodes if n.op == "call_function"}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch", [None, 2], ids=["any batch", "two images"])
def test_the_program_computes_what_the_compiled_model_does(name: str, batch: int | None) -> None:
    """Breaks if outputs are mixed up, or if the plain operators are not what they replace."""
    model = tiny.encoder(depth=4)
    program = exported(model, batch)
    pruned = tokenpass.rewrite(program, METHODS[name], always_rewrite=True)
    assert pruned is not program
    assert not any("tokenpass" in name for name in operators(pruned))
    for count in (2,) if batch else (1, 2, 5):
        x = images(count)
        torch.testing.assert_close(
            pruned.module()(x), compiled(model, METHODS[name])(x), rtol=0, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_full_budget_is_the_model(cast: bool) -> None:
    """Breaks if a region of autocast is lost, or a constant, or a name of an output."""
    model = Everything(cast)
    pruned = tokenpass.rewrite(exported(model), HiPrune(keep=1.0), always_rewrite=True)
    x = images(3)
    torch.testing.assert_close(pruned.module()(x), model(x), rtol=0, atol=5e-2 if cast else 1e-5)


@pytest.mark.slow
def test_gradients_flow_where_they_did() -> None:
    """Breaks if a region without gradients is lost, or spreads."""
    model = Everything(cast=False)
    pruned = tokenpass.rewrite(exported(model), HiPrune(keep=1.0), always_rewrite=True).module()
    got, wanted = pruned(images(2)), model(images(2))
    assert not got["double"].requires_grad
    got["z"].square().sum().backward()
    wanted["z"].square().sum().backward()
    own = dict(pruned.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=0, atol=1e-5 * (1 + scale))


@pytest.mark.slow
def test_the_signature_stays() -> None:
    """Breaks if inputs, parameters, constants or the range of the batch change."""
    program = exported(Everything())
    pruned = tokenpass.rewrite(program, HiPrune(keep=0.5), always_rewrite=True)
    before, after = program.graph_signature, pruned.graph_signature
    assert after.input_specs == before.input_specs
    assert [(s.kind, s.target) for s in after.output_specs] == [
        (s.kind, s.target) for s in before.output_specs
    ]
    assert pruned.range_constraints == program.range_constraints
    assert pruned.constants.keys() == program.constants.keys()
    for name, value in program.state_dict.items():
        assert pruned.state_dict[name] is value


@pytest.mark.slow
def test_the_original_program_is_as_it_was() -> None:
    """Breaks if a rewrite changes its graph, or fixes one of its sizes."""
    program = exported(Everything())
    before, guards = str(program), len(_shapes_of(program).guards)
    tokenpass.rewrite(program, HiPrune(keep=0.5), always_rewrite=True)
    assert str(program) == before
    assert len(_shapes_of(program).guards) == guards


def _shapes_of(program: ExportedProgram) -> Any:
    (image,) = (n for n in program.graph.nodes if n.name == "x")
    return image.meta["val"].shape[0].node.shape_env


def test_explain_says_the_same_as_of_the_module() -> None:
    """Breaks if a program is understood otherwise than the module that it comes from."""
    model, method = tiny.encoder(depth=4), HiPrune(keep=0.5)
    of_program = tokenpass.explain(exported(model, 2), method=method)
    of_module = tokenpass.explain(model, images(2), method=method)
    assert of_program.converted
    assert of_program.flops == of_module.flops
    assert of_program.flops_before == of_module.flops_before
    assert of_program.cost == of_module.cost
    rows = [
        [(row.tokens_in, row.tokens_out) for row in report.graphs[0].blocks]
        for report in (of_program, of_module)
    ]
    assert rows[0] == rows[1]
    assert "4 blocks, 4 attentions, 4 MLPs in 1 graph: converted." in str(of_program)


class Casting(tiny.Attention):
    """Casts that torch.export writes assertions for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def test_assertions_of_dtypes_do_not_hold_on_to_tokens() -> None:
    """Breaks if values are computed on all tokens because an assertion reads them."""
    method = HiPrune(keep=0.5, dropped="discard")
    plain = tokenpass.explain(exported(tiny.encoder(depth=4), 2), method=method)
    casting = tokenpass.explain(exported(tiny.encoder(Casting, depth=4), 2), method=method)
    assert casting.flops == plain.flops < plain.flops_before


def test_a_program_without_attention_comes_back_as_it_was() -> None:
    """Breaks if nothing is said, or if the program is another one."""
    program = exported(nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU()).eval(), 2)
    with pytest.warns(TokenpassWarning, match="nothing to convert") as caught:
        assert tokenpass.rewrite(program) is program
    assert len(caught) == 1
    assert not tokenpass.explain(program).converted


def test_full_budget_without_always_rewrite_is_the_program_itself() -> None:
    program = exported(tiny.encoder())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenpass.rewrite(program, HiPrune(keep=1.0)) is program


class AnySize(nn.Module):
    """No position table, so that any image can be encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, tiny.WIDTH, tiny.PATCH, tiny.PATCH)
        self.blocks = nn.Sequential(Block(), Block())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.patch(x).flatten(2).transpose(1, 2))
        return out


@pytest.mark.slow
def test_a_dynamic_image_size_is_refused_with_a_hint() -> None:
    """Breaks if the size at hand is burnt into the program."""
    side = 2 * Dim("rows", min=2, max=64)
    program = export(AnySize(), (images(2),), dynamic_shapes={"x": {2: side}})
    with pytest.warns(TokenpassWarning, match="image size is dynamic"):
        assert tokenpass.rewrite(program, HiPrune(keep=0.5)) is program
    report = tokenpass.explain(program, method=HiPrune(keep=0.5))
    (refusal,) = [item for item in report.refusals if "one image size" in item.hint]
    assert refusal.node


def test_gating_is_refused() -> None:
    program = exported(tiny.encoder())
    for door in (tokenpass.rewrite, lambda p, m: tokenpass.explain(p, method=m)):
        with pytest.raises(OptionError, match="keeps state between frames"):
            door(program, Eventful())


@pytest.mark.slow
def test_saved_and_loaded() -> None:
    """Breaks if something in the program cannot be written down, a region without values say."""
    model, file = Everything(), io.BytesIO()
    pruned = tokenpass.rewrite(exported(model), HiPrune(keep=0.5), always_rewrite=True)
    torch.export.save(pruned, file)
    file.seek(0)
    x = images(3)
    torch.testing.assert_close(torch.export.load(file).module()(x), pruned.module()(x))


ELSEWHERE = """
import sys, torch
program, values = torch.export.load("program.pt2"), torch.load("values.pt")
package = torch._inductor.aoti_compile_and_package(program, package_path="package.pt2")
run = torch._inductor.aoti_load_package(package)
for x, wanted in values:
    torch.testing.assert_close(program.module()(x), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(run(x), wanted, rtol=0, atol=1e-5)
assert not [name for name in sys.modules if name.startswith("tokenpass")]
"""


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.timeout(1800)
def test_compiled_ahead_of_time_where_there_is_no_tokenpass(tmp_path: Path) -> None:
    """Breaks if the program needs an operator that only Python has, or forgets the batch."""
    model = Encoder([Block(), Block()])
    pruned = tokenpass.rewrite(exported(model), HiPrune(keep=0.5), always_rewrite=True)
    torch.export.save(pruned, tmp_path / "program.pt2")
    fast = compiled(model, HiPrune(keep=0.5))
    with torch.no_grad():
        values = [(images(count), fast(images(count))) for count in (2, 5)]
    torch.save(values, tmp_path / "values.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, check=True)
