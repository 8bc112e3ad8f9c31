"""Nothing is patched: the user's module, its class and torch are as they were.

Breaks if compiling leaves a hook, an attribute, a forward or a global setting behind.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo import BY_NAME


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Identities of all that a module and its classes hold."""
    state: dict[str, Any] = {}  # Dynamo marks modules itself, so it must have seen them
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            state |= {f"{name}.{key}.{item}": id(held) for item, held in items}
        for owner in type(module).__mro__:
            state |= {f"{owner.__qualname__}.{k}": id(v) for k, v in vars(owner).items()}
    return state


def test_the_module_and_its_class() -> None:
    entry = BY_NAME["transformers/ViTModel"]
    model, images = entry.build(), entry.images(2)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = torch.compile(model, backend="eager")(images)
        before = snapshot(model)
        half: dict[str, Any] = {"keep": 0.5, "inner": "eager"}
        torch.compile(model, backend="tokenpass", options=half)(images)
        assert snapshot(model) == before
        found = model(images)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_torch() -> None:
    code = """
        import torch, torch.nn.functional as F
        from torch import nn
        import torch._dynamo, torch._inductor.compile_fx

        def functions():
            places = [torch, F, torch.Tensor, torch.fx, nn.Module, nn.MultiheadAttention]
            return {(str(p), k): id(v) for p in places for k, v in vars(p).items() if callable(v)}

        def settings():
            return [
                torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
                torch.are_deterministic_algorithms_enabled(), torch.random.initial_seed(),
                torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled(),
                torch._dynamo.config.get_config_copy(), torch._inductor.config.get_config_copy(),
            ]

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = nn.Conv2d(3, 32, 4, 4)
                layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
                self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            def forward(self, x):
                return self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1)

        model, images = Model().eval(), torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.compile(model, backend="eager")(images)
            before, set_before = functions(), settings()
            state = torch.random.get_rng_state()
            fast = torch.compile(
                model, backend="tokenpass", options={"keep": 0.5, "inner": "eager"}
            )
            fast(images)
            assert torch.equal(torch.random.get_rng_state(), state)
            assert settings() == set_before
        after = functions()
        changed = [name for name in before if after.get(name) != before[name]]
        assert not changed, changed
        import tokenpass
        assert tokenpass.report(fast).converted
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
