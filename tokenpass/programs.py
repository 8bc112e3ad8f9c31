"""``torch.export`` programs as graphs that the passes take, and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    OutputKind,
    OutputSpec,
)

from tokenpass import export_torch_internals as export_internals
from tokenpass import torch_internals as internals
from tokenpass.capture import Capturing, GraphInputs
from tokenpass.errors import BrokenInvariantError
from tokenpass.plain_kernels import PLAIN

STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def inputs_of(program: ExportedProgram) -> GraphInputs:
    """The inputs of a program's graph: parameters, buffers and constants before all others.

    They are the fakes that it was exported with; its sizes may not be fixed, since it must go on
    taking what it takes.
    """
    fakes = tuple(node.meta["val"] for node in program.graph.find_nodes(op="placeholder"))
    kinds = (spec.kind for spec in program.graph_signature.input_specs)
    state = frozenset(number for number, kind in enumerate(kinds) if kind in STATE)
    return GraphInputs(fakes, state, export_internals.mode_of(fakes), fixable=False)


def program_of(
    program: ExportedProgram, module: fx.GraphModule, inputs: GraphInputs
) -> ExportedProgram:
    """A program that computes what ``module`` does.

    Args:
        program: It takes the same inputs, and has the same parameters and constants.
        module: Its outputs come first among those of ``module``.
        inputs: Of both.

    Raises:
        BrokenInvariantError: If the program could not be what it was: a value that it writes into
            a buffer has another shape, or a constant was made that it does not have.
    """
    plain = internals.trace(Capturing(module).run, inputs.fakes, inputs.mode, PLAIN)
    specs = program.graph_signature.output_specs
    graph = _with_names(plain.graph, program.graph, len(specs))
    signature = _signature(program.graph_signature, graph)
    _check(program.graph, graph, specs)
    made = export_internals.with_wrapped_regions(fx.GraphModule(plain, graph))
    return export_internals.program_with(program, made, signature)


def _with_names(plain: fx.Graph, original: fx.Graph, outputs: int) -> fx.Graph:
    """``plain`` with the inputs of ``original`` and the first ``outputs`` of its own outputs."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    pairs = zip(
        plain.find_nodes(op="placeholder"), original.find_nodes(op="placeholder"), strict=True
    )
    for node, named in pairs:
        copies[node] = graph.placeholder(named.name)
        copies[node].meta = copy.copy(named.meta)
    for node in plain.nodes:
        if node.op == "output":
            kept = tuple(node.args[0])[:outputs]
            graph.output(fx.map_arg(kept, copies.__getitem__)).meta = copy.copy(node.meta)
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code()
    _join_regions(graph)
    return graph


def _join_regions(graph: fx.Graph) -> None:
    """Leave out switches of autocast and of gradients between which nothing is."""
    kept: list[fx.Node] = []
    for node in list(graph.nodes):
        last = kept[-1] if kept else node
        if internals.is_exit_autocast(last.target) and _enters_as(node, last.args[0]):
            node.replace_all_uses_with(last.args[0])
            _erase(graph, node, kept.pop())
        elif internals.is_exit_autocast(node.target) and node.args[0] is last:
            _erase(graph, node, kept.pop())
        elif internals.is_set_grad(node.target) and internals.is_set_grad(last.target) and kept:
            _erase(graph, kept.pop())
            kept.append(node)
        else:
            kept.append(node)


def _enters_as(node: fx.Node, entered: object) -> bool:
    """Whether ``node`` enters the region of autocast that ``entered`` did."""
    assert isinstance(entered, fx.Node)
    return internals.is_enter_autocast(node.target) and node.args == entered.args


def _erase(graph: fx.Graph, *nodes: fx.Node) -> None:
    for node in nodes:
        graph.erase_node(node)


def _signature(before: ExportGraphSignature, graph: fx.Graph) -> ExportGraphSignature:
    """``before`` with the names that outputs have in ``graph``."""
    return ExportGraphSignature(
        input_specs=list(before.input_specs),
        output_specs=[
            _renamed(spec, value)
            for spec, value in zip(before.output_specs, _outputs(graph), strict=True)
        ],
    )


def _outputs(graph: fx.Graph) -> Sequence[Any]:
    """What a graph returns: nodes, and constants."""
    return cast(Sequence[Any], graph.output_node().args[0])


def _renamed(spec: OutputSpec, value: object) -> OutputSpec:
    if isinstance(spec.arg, ConstantArgument) or not isinstance(value, fx.Node):
        return spec
    return replace(spec, arg=replace(spec.arg, name=value.name))


def _check(original: fx.Graph, graph: fx.Graph, specs: list[OutputSpec]) -> None:
    for node in graph.find_nodes(op="get_attr"):
        raise BrokenInvariantError(f"{node.target}: a constant that the program does not have")
    pairs = zip(_outputs(original), _outputs(graph), strict=True)
    for spec, (before, after) in zip(specs, pairs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            continue
        shapes = [node.meta["val"].shape for node in (before, after)]
        if shapes[0] != shapes[1]:
            raise BrokenInvariantError(f"{spec.target} would be written with another shape")
