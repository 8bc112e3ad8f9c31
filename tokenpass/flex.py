"""``flex_attention`` in Dynamo's graph that changes no score and hides no key, as fused attention.

What makes its empty block mask goes with it: that is computed under ``vmap``, with tensors that
cannot be traced a second time.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from tokenpass import torch_internals as internals
from tokenpass.errors import NotUnderstoodError

FILLED = ("new_ones", torch.ones)
"""What makes a tensor of ones, or of true."""


def without_flex_attention(module: fx.GraphModule) -> fx.GraphModule:
    """``module``, or a copy in which ``flex_attention`` is the fused operator.

    Raises:
        NotUnderstoodError: If one changes scores, hides keys or is read for more than its output.
    """
    if not any(internals.is_flex_attention(node.target) for node in module.graph.nodes):
        return module
    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        if internals.is_flex_attention(node.target):
            _replace(module, graph, node)
    _erase_idle(graph)
    return fx.GraphModule(module, graph)


def _replace(module: fx.GraphModule, graph: fx.Graph, node: fx.Node) -> None:
    query, key, value, scores, blocks, scale = node.args[:6]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(blocks, (tuple, list))
    lengths = (_shape(query)[-2], _shape(key)[-2])
    if not _returns_its_first_input(_function(module, scores)):
        raise NotUnderstoodError("flex_attention with a score_mod: only plain scores are known")
    if not (_one_block(blocks, lengths) and _shows_everything(_function(module, blocks[-1]))):
        raise NotUnderstoodError("flex_attention with a block mask: only no mask at all is known")
    if any(user.target is not operator.getitem for user in node.users) or any(
        user.args[1] != 0 and user.users for user in node.users
    ):
        raise NotUnderstoodError("flex_attention whose row sums are read")
    grouped = _shape(query)[1] != _shape(key)[1]
    with graph.inserting_before(node):
        fused = graph.call_function(
            functional.scaled_dot_product_attention,
            (query, key, value),
            {"scale": scale, "enable_gqa": grouped},
        )
    fused.meta = dict(node.meta)
    for user in list(node.users):
        user.replace_all_uses_with(fused)
        graph.erase_node(user)
    graph.erase_node(node)


def _erase_idle(graph: fx.Graph) -> None:
    """Erase what comes from constants and reaches no output, in-place writes among it too.

    What switches a mode has no operand and no result, and stays.
    """
    idle: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "get_attr"):
            continue
        sources = node.all_input_nodes
        alone = isinstance(node.meta.get("example_value"), Tensor) or node.op == "get_attr"
        if all(source in idle for source in sources) if sources else alone:
            idle.add(node)
    pending = [node for node in graph.nodes if node not in idle]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in idle:
                idle.remove(source)
                pending.append(source)
    for node in reversed(list(graph.nodes)):
        if node in idle:
            graph.erase_node(node)


def _shape(node: fx.Node) -> torch.Size:
    value = node.meta["example_value"]
    assert isinstance(value, Tensor)
    return value.shape


def _function(module: fx.GraphModule, node: Any) -> fx.Graph:
    assert isinstance(node, fx.Node)
    inner = module.get_submodule(str(node.target))
    assert isinstance(inner, fx.GraphModule)
    return inner.graph


def _result(graph: fx.Graph) -> Any:
    (output,) = graph.find_nodes(op="output")
    result = output.args[0]
    return result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result


def _returns_its_first_input(graph: fx.Graph) -> bool:
    return _result(graph) is next(iter(graph.nodes))


def _one_block(blocks: Any, lengths: tuple[int, int]) -> bool:
    """Whether all keys are in one block, which every query looks at."""
    counts, sizes = blocks[2], blocks[-3:-1]
    always = isinstance(counts, fx.Node) and counts.target in FILLED
    return always and all(size >= length for size, length in zip(sizes, lengths, strict=True))


def _shows_everything(graph: fx.Graph) -> bool:
    result = _result(graph)
    return isinstance(result, fx.Node) and result.target in FILLED
