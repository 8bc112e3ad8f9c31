"""In-place operations as functional ones, where nothing else refers to the value written."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from tokenpass.graph import is_tensor, operands, tensor_of

aten = torch.ops.aten


def functionalise(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Replace in-place operations by functional ones where no other name of the value is in use.

    What stays in place (a write through a view, into an input, or with a cast) keeps its order and
    is never moved by a later pass: see :func:`written_values`.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        functional = _functional(node)
        if functional is None or not _sole_name(node, order):
            continue
        target = node.args[0]
        assert isinstance(target, fx.Node)
        if not _same_result(node, functional, mode):
            continue
        node.target = functional
        for user in [u for u in target.users if u is not node and order[u] > order[node]]:
            user.replace_input_with(target, node)
    graph.lint()


def _mutates(node: fx.Node) -> bool:
    """Whether ``node`` writes into its first operand."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    first = node.target._schema.arguments[:1]
    return bool(first) and first[0].alias_info is not None and first[0].alias_info.is_write


def _functional(node: fx.Node) -> Any:
    """The operator that computes what the in-place operator of ``node`` writes."""
    if not _mutates(node):
        return None
    assert isinstance(node.target, torch._ops.OpOverload)
    name, overload = node.target._schema.name.split("::")[1], node.target._overloadname
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, overload, None)


def _views(node: fx.Node) -> bool:
    """Whether the result of ``node`` may share memory with its first operand."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return any(item.alias_info is not None for item in returns)


def _names_of_value(node: fx.Node) -> set[fx.Node]:
    """Every node that may share memory with ``node``."""
    root = node
    while _views(root) and operands(root):
        root = operands(root)[0]
    found, stack = {root}, [root]
    while stack:
        for user in stack.pop().users:
            shares = _views(user) and operands(user)[:1] and operands(user)[0] in found
            if shares and user not in found:
                found.add(user)
                stack.append(user)
    return found


def _sole_name(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether what ``node`` writes into is read afterwards under no other name."""
    target = node.args[0]
    if not isinstance(target, fx.Node) or not is_tensor(target):
        return False
    later = {n for n in _names_of_value(node) if order[n] > order[node]}
    for name in _names_of_value(node) - {target, node} - later:
        if name.op in ("placeholder", "get_attr"):
            return False
        if any(order[user] > order[node] for user in name.users):
            return False
    return target.op not in ("placeholder", "get_attr")


def _same_result(node: fx.Node, functional: Any, mode: FakeTensorMode) -> bool:
    """Whether the functional form gives a value of the same shape and dtype."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        with mode:
            result = functional(*args, **kwargs)
    except (RuntimeError, TypeError):
        return False
    before = tensor_of(node)
    return bool(
        isinstance(result, Tensor)
        and result.dtype == before.dtype
        and tuple(result.shape) == tuple(before.shape)
    )


def written_values(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes that share memory with something that the graph writes into."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if _mutates(node):
            found |= _names_of_value(node)
    return frozenset(found)
