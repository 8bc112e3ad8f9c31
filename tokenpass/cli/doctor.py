"""``tokenpass doctor``: what is installed here, and what would work."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional

import tokenpass
from tokenpass.cli import choice
from tokenpass.cli.screen import NO, print_json, results, track
from tokenpass.errors import described

OPTIONAL = {
    "timm": "models timm:NAME",
    "torchvision": "models torchvision:NAME",
    "transformers": "models transformers:CLASS",
    "matplotlib": "pictures",
    "pillow": "photographs",
    "av": "video",
}
"""Packages that some commands need, and what for."""

WIDTH, HEADS, DEPTH, PATCH, SIDE = 32, 2, 4, 4, 32
"""Of the small encoder that is compiled to see whether that works."""


@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    Attributes:
        name: Of what was looked at.
        value: What was found.
        good: Whether it works; ``None`` for what is only stated or optional.
    """

    name: str
    value: str
    good: bool | None = None


def command(as_json: choice.Json = False) -> int:
    """Show versions, devices and compilers, and try what tokenpass needs.

    Exit code 1: something that tokenpass needs does not work.
    """
    tried = [_tried(name, test) for name, test in track(list(TESTS.items()), "trying")]
    findings = [*_versions(), *_devices(), *_optional(), *tried]
    if as_json:
        print_json([asdict(item) for item in findings])
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for item in findings:
            mark = {True: Text("ok", "green"), False: Text("no", "red"), None: Text("")}[item.good]
            table.add_row(mark, item.name, Text(item.value, overflow="fold"))
        results().print(table)
    return NO if any(item.good is False for item in findings) else 0


def _versions() -> Iterator[Finding]:
    yield Finding("tokenpass", tokenpass.__version__)
    yield Finding("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding("torch", torch.__version__)


def _devices() -> Iterator[Finding]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("CPU", f"{torch.get_num_threads()} threads, {capability}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("CUDA", ", ".join(names) or "no device")
    compiler = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
    yield Finding("C++ compiler", compiler or "none: install g++, Inductor needs it on a CPU")


def _optional() -> Iterator[Finding]:
    modules = {"pillow": "PIL"}
    for name, purpose in OPTIONAL.items():
        if util.find_spec(modules.get(name, name)) is None:
            yield Finding(name, f"not installed: {purpose} would not work")
        else:
            yield Finding(name, metadata.version(name))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.joint, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        joint = self.joint(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*joint.unbind(0))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))  # type: ignore[no-any-return]


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(DEPTH)))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.patch(images).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


def _works(inner: str, method: tokenpass.HiPrune | tokenpass.Eventful) -> str:
    """Compile a small encoder at full budget, with the rewrite, and compare with eager.

    Raises:
        RuntimeError: If it is not converted, or computes something else.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, images = _Encoder().eval(), torch.randn(1, 3, SIDE, SIDE)
    backend = tokenpass.backend(method, inner=inner, always_rewrite=True)
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = model(images)
        for _ in range(2):
            error = float((fast(images) - expected).abs().max())
    if not tokenpass.report(fast).converted:
        raise RuntimeError("a plain encoder was not converted")
    if not error <= 1e-4:
        raise RuntimeError(f"the result is off by {error:.1e}")
    return f"works, largest difference from eager {error:.0e}"


def _writes() -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"0")
    return f"works, in {tempfile.gettempdir()}"


TESTS: dict[str, Callable[[], str]] = {
    "temporary files": _writes,
    "pruning, eager": lambda: _works("eager", tokenpass.HiPrune(keep=1.0)),
    "gating, eager": lambda: _works("eager", tokenpass.Eventful(keep=1.0)),
    "pruning, Inductor": lambda: _works("inductor", tokenpass.HiPrune(keep=1.0)),
}


def _tried(name: str, test: Callable[[], str]) -> Finding:
    try:
        return Finding(name, test(), True)
    except Exception as error:
        return Finding(name, described(error), False)
