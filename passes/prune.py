"""Rewrite a graph so that tokens leave it: the graph is traced again, on fewer tokens.

Every node runs on the version of its operands that :mod:`tokenpass.passes.versions` decided. What
is missing is made from what is there: fewer tokens by taking them, all tokens by putting the
dropped ones back (with the value of the token they were merged into, or with their own last one), a
table that all images share by taking each image's rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tokenpass import torch_internals as internals
from tokenpass.blocks import Attention
from tokenpass.capture import Captured, in_region_of
from tokenpass.cuts import as_outputs
from tokenpass.dims import Dims
from tokenpass.errors import BrokenInvariantError
from tokenpass.facts import Facts
from tokenpass.graph import expression, values_of, with_arguments
from tokenpass.layout import Layout
from tokenpass.passes.conversions import Conversions, arranged
from tokenpass.passes.key_bias import with_key_bias
from tokenpass.passes.stages import Stages
from tokenpass.passes.tables import Tables
from tokenpass.passes.versions import Versions
from tokenpass.pruning import Pruning

RULE = "prune"


def prune(
    captured: Captured, facts: Facts, plan: Pruning, versions: Versions, *, record: bool = False
) -> fx.GraphModule:
    """The graph with the cuts of ``plan``.

    Its outputs are those of the original and, after them, the grid positions of the surviving patch
    tokens ``(B, K)``, and what :func:`~tokenpass.cuts.as_outputs` tells of the cuts if asked.
    """

    def run(*inputs: Any) -> Any:
        return _Pruner(captured, facts, plan, versions, record).run(inputs)

    module = internals.trace(run, captured.inputs, captured.mode)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


class _Pruner:
    """Runs the original graph once, version by version."""

    def __init__(
        self, captured: Captured, facts: Facts, plan: Pruning, versions: Versions, record: bool
    ) -> None:
        self.record = record
        self.module = captured.module
        self.facts = facts
        self.plan = plan
        self.versions = versions

        def extent(size: Any) -> Any:
            return internals.symbolic_size(captured.mode, size)

        self.layout = Layout(plan.grid, plan.batch, extent)
        self.stages = Stages(facts, plan, self.layout, self.value, self.operand)
        self.cuts = {stage.at: stage.number for stage in plan.stages if stage.at is not None}
        self.env: dict[tuple[fx.Node, int], Any] = {}
        self.merged: dict[fx.Node, Any] = {}
        self.convert = Conversions(facts, plan, self.layout, self.stages)
        self.tables = Tables(facts, plan.grid, self.layout, self.convert)
        self.attention: dict[fx.Node, Attention] = {
            match.softmax: match
            for match in plan.found.attentions
            if plan.grid.carried_by(match.key_dim)
        }

    def run(self, inputs: tuple[Any, ...]) -> Any:
        remaining = iter(inputs)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.env[node, 0] = next(remaining)
            elif node.op == "output":
                return self._outputs(node)
            elif not values_of(node):
                self.env[node, 0] = self._number(node)
            elif self._level(node) in self.versions.computed.get(node, ()):
                self.value(node, self._level(node))
        raise AssertionError("a graph without an output")

    def _number(self, node: fx.Node) -> Any:
        """The original's number where it is a size; else what ``node`` computes."""
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return self.layout.extent(expression(value))
        return self._call(node, *self._arguments(node))

    def _level(self, node: fx.Node) -> int:
        return self.versions.level[node]

    def _outputs(self, output: fx.Node) -> Any:
        final = len(self.plan.stages)
        whole = self.plan.method.restores

        def produce(node: fx.Node) -> Any:
            if self.plan.method.merges and not self.plan.inside and self.carries(node):
                return self._merged_output(node)
            return self._read(node, 0 if whole or not self.carries(node) else final)

        outputs = fx.map_arg(output.args[0], produce)
        flat = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        made = [self.stages[n] for n in range(1, final + 1)] if self.record else []
        told = as_outputs((left.positions, left.owner_of_all) for left in made)
        return (*flat, self.stages[final].positions, *told)

    def _merged_output(self, node: fx.Node) -> Any:
        """An output of an encoder that ran in full, its dropped tokens merged afterwards."""
        dims = self.facts.dims(node)
        merged = self.convert.cut(self.value(node, 0), dims, 1)
        return self.convert.restore(merged, dims, 1, None) if self.plan.method.restores else merged

    def carries(self, node: fx.Node) -> bool:
        return self.plan.carried_in(self.facts.effects[node].outs)

    # ------------------------------------------------------------ values

    def value(self, node: fx.Node, version: int) -> Any:
        """What ``node`` computes, with the tokens of ``version``."""
        if not self.carries(node):
            version = self._level(node)
        key = (node, version)
        if key not in self.env:
            with internals.provenance(node, RULE):
                self.env[key] = self._make(node, version)
        return self.env[key]

    def _read(self, node: fx.Node, version: int) -> Any:
        """``node`` as its readers see it: all tokens of a stream that was cut are merged ones."""
        cut = self.cuts.get(node)
        if version or cut is None or not self.plan.method.merges:
            return self.value(node, version)
        if node not in self.merged:
            left = self.value(node, cut)
            self.merged[node] = self.convert.restore(left, self.facts.dims(node), cut, None)
        return self.merged[node]

    def _make(self, node: fx.Node, version: int) -> Any:
        if node.op == "get_attr":
            assert isinstance(node.target, str)
            return getattr(self.module, node.target)
        if version in self.versions.computed[node]:
            return self._compute(node, version)
        dims = self.facts.dims(node)
        cut = self.cuts.get(node)
        if version == self.plan.prefix_only:
            have = self.versions.computed[node][-1]
            return self.layout.without_grid(self.value(node, have), dims)
        if cut is not None and cut == version:
            return self.convert.cut(self.value(node, version - 1), dims, version)
        computed = [v for v in self.versions.computed[node] if v != self.plan.prefix_only]
        if version == 0:
            have = max(computed)
            last = self._last(node, have, dims)
            return self.convert.restore(self.value(node, have), dims, have, last)
        have = max(v for v in (*computed, cut or 0) if v < version)
        return self.convert.take(self.value(node, have), dims, have, version)

    def _last(self, node: fx.Node, have: int, dims: Dims) -> Tensor | None:
        """The stream, with all its tokens, when those that version ``have`` lacks left it.

        ``None`` inside an attention, where a token that left has no weight, and where tokens are
        merged, so that none is lost.
        """
        if any(node in (match.softmax, match.out) for match in self.attention.values()):
            return None
        at = self.plan.stages[have - 1].at
        if at is not None:
            stream = arranged(self.value(at, 0), self.facts.dims(at), dims)
            if stream is not None:
                return stream
        if self.plan.method.merges:
            return None
        raise BrokenInvariantError(f"{node.name}: nothing says what its discarded tokens were")

    # ------------------------------------------------------------ computing

    def _compute(self, node: fx.Node, version: int) -> Any:
        args, kwargs = self._arguments(node, version)
        attention = self.attention.get(node)
        level = self._level(node)
        sizes = self.stages[level].sizes if attention is not None and level else None
        if attention is not None and sizes is not None:
            bias = self.stages.key_bias(attention, sizes)
            dims = self.facts.dims(node)
            args, kwargs = with_key_bias(node, attention, bias, self.layout, dims, args, kwargs)
        return self._call(node, args, kwargs)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        assert callable(node.target)
        with in_region_of(node):
            return node.target(*args, **kwargs)

    def _arguments(self, node: fx.Node, version: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        versions = self.versions.reads.get((node, version), ())
        reads = iter(versions)
        seen = iter(self.facts.effects[node].seen)
        fused = node in self.attention and self.attention[node].fused
        of_keys = self._level(node) if fused else version

        def produce(source: fx.Node) -> Any:
            if not values_of(source):
                return self.env[source, 0]
            return self._operand(source, next(seen), next(reads, 0), version, of_keys)

        args, kwargs = fx.map_arg((node.args, node.kwargs), produce)
        counted = self.plan.prefix_only if self.plan.prefix_only in versions else version
        if not counted:
            return args, kwargs
        return with_arguments(node, args, kwargs, self.convert.literals(node, counted))

    def operand(self, reader: fx.Node, source: fx.Node, version: int) -> Tensor:
        """``source`` as ``reader`` would see it if all its tokens were those of a version."""
        seen = dict(self.facts.seen(reader))[source]
        read = version if self.carries(source) else 0
        return self._operand(source, seen, read, version, version)  # type: ignore[no-any-return]

    def _operand(self, source: fx.Node, seen: Dims, read: int, version: int, of_keys: int) -> Any:
        x, carries = self._read(source, read), self.carries(source)
        if not version or not isinstance(x, Tensor) or (carries and read != version):
            return x
        return self.tables.meet(x, source, seen, version, of_keys, carries=carries)
