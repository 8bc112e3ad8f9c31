"""Imports point one way, files stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "tokenpass": "tokenpass",
    "passes": "tokenpass.passes",
    "patterns": "tokenpass.patterns",
    "tokenpass/cli": "tokenpass.cli",
    "tokenpass/plot": "tokenpass.plot",
    "tokenpass/selectors": "tokenpass.selectors",
}

LAYERS = [
    {
        "errors",
        "calibration",
        "reasons",
        "dims",
        "kernels",
        "markup",
        "plain_kernels",
        "triton_kernels",
    },
    {"torch_internals", "compiler_torch_internals", "export_torch_internals"},
    {"wrapped_inputs"},
    {"arrivals"},
    {"config", "cuts", "flex", "graph", "grid", "merging", "methods", "timing", "views"},
    {"attention_rows", "native", "running_softmax"},
    {"axis_rule", "blocks", "capture", "facts", "gates", "layout", "options"},
    {"exchange_cost", "incremental"},
    {"held", "rows", "scenes", "selection", "state"},
    {"gating", "proof", "pruning", "report"},
    {"partial", "programs", "logs"},
    {"patterns"},
    {"passes"},
    {"analysis"},
    {"pipeline", "gated"},
    {"budgets", "prune_and_gate"},
    {"sessions"},
    {"streams"},
    {"runtime", "streaming", "explain", "export"},
    {"answering"},
    {"api", "backend"},
    {"latency", "plot", "report_page"},
    {"vision_attention", "visual_cells", "visual_output", "prompts"},
    {"visual_grid"},
    {"visual_tokens"},
    {"selectors", "visual_path"},
    {"visual_encoder", "visual_inputs"},
    {"vlm_protocol"},
    {"vlm_caches", "vlm_compiled", "vlm_cost", "visual_choice"},
    {"vision_language"},
    {"public"},
    {"__init__"},
    {"cli", "__main__"},
]
"""From the bottom up: a module imports from its own layer or from those below it."""

LIMITS = {"passes": 250, "patterns": 250, "tokenpass": 400, "tests": 400, "benchmarks": 300}
"""Lines in a file of each folder."""

DOOR = "torch_internals"


def modules() -> dict[str, Path]:
    """Dotted names of all modules of the package."""
    found: dict[str, Path] = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            name = prefix if path.stem == "__init__" else f"{prefix}.{path.stem}"
            found[name] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """What a file imports, as dotted names as far as they are known."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(imported: str) -> str | None:
    """The module of the package that an import reaches, if any."""
    parts = imported.split(".")
    candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in candidates if name in MODULES), None)


def layer_of(module: str) -> int:
    part = module.split(".")[1] if "." in module else "__init__"
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """Breaks if, say, a pattern imports a pass."""
    for imported in imports(MODULES[module]):
        target = module_of(imported)
        if target is not None and target != module:
            assert layer_of(target) <= layer_of(module), f"{module} imports {target}"


def test_imports_have_no_cycle() -> None:
    """Breaks if two modules of one layer need each other."""
    needs = {
        name: {t for t in map(module_of, imports(path)) if t not in (None, name)}
        for name, path in MODULES.items()
    }
    while needs:
        free = [name for name, wanted in needs.items() if not wanted & needs.keys()]
        assert free, f"a cycle among {sorted(needs)}"
        for name in free:
            del needs[name]


@pytest.mark.parametrize("module", MODULES)
def test_private_torch_has_one_door(module: str) -> None:
    """Breaks if a private torch API is used anywhere else."""
    if module.endswith(DOOR):
        return
    for imported in imports(MODULES[module]):
        parts = imported.split(".")
        private = [part for part in parts[1:] if part.startswith("_")]
        if parts[0] == "torch":
            assert not private or parts[1:3] == ["_subclasses", "FakeTensorMode"], imported


@pytest.mark.parametrize("folder", LIMITS)
def test_files_are_small(folder: str) -> None:
    """Breaks if a file outgrows one reading."""
    for path in (ROOT / folder).rglob("*.py"):
        if path.is_relative_to(ROOT / "tokenpass") and path.resolve() != path:
            continue
        lines = len(path.read_text().splitlines())
        assert lines <= LIMITS[folder], f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_product_code_names_a_model() -> None:
    """Breaks if an architecture is special-cased by its name or its library."""
    names = ("timm", "transformers", "torchvision", "deit", "dinov", "siglip", "eva02", "beit")
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Name, ast.Attribute)):
                word = node.id if isinstance(node, ast.Name) else node.attr
                assert not any(name in word.lower() for name in names), f"{path.name}: {word}"
