"""What was found, what is done with it, what it costs: printed by ``explain``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy
from rich.console import Console
from rich.table import Table

from tokenpass.blocks import Attention, Block, Mlp
from tokenpass.calibration import Calibration, Load
from tokenpass.graph import short_place

WIDTH = 100


@dataclass(frozen=True)
class Refusal:
    """Something that was left as it was.

    Attributes:
        reason: Why.
        node: Name of the node at fault, empty if there is none.
        stack: The user's source lines that the node was traced from, innermost last.
    """

    reason: str
    node: str = ""
    stack: str = ""

    @property
    def place(self) -> str:
        """The innermost source line."""
        lines = [line.strip() for line in self.stack.splitlines() if "File " in line]
        return lines[-1] if lines else ""


@dataclass(frozen=True)
class BlockReport:
    """One block in a rewritten graph.

    Attributes:
        block: What was matched.
        tokens_in: Patch tokens that the block computes on.
        tokens_out: Patch tokens after it.
        updated: Patch tokens that are computed anew in a frame; ``None`` where there are no frames.
    """

    block: Block
    tokens_in: int
    tokens_out: int
    updated: int | None = None


@dataclass(frozen=True)
class GraphReport:
    """One graph of a model.

    Attributes:
        attentions: Every attention, in execution order.
        mlps: Every MLP.
        blocks: Attention and MLP around the residual stream, with the tokens that they see.
        converted: Whether the method changes something in this graph.
        refusals: What was left alone.
        proof: How the patch tokens were recognised, line by line.
        cost: FLOPs after the rewrite as a polynomial in the token counts; ``cost_before`` without.
        flops: The same as a number for the given inputs; ``flops_before`` without the rewrite.
        tokens: Patch tokens; ``kept`` of them are left at the end.
        failed: Whether a rewrite was begun and undone.
        load: What a call asks of the machine, if that was asked; ``load_before`` without the
            rewrite.
    """

    attentions: Sequence[Attention] = ()
    mlps: Sequence[Mlp] = ()
    blocks: Sequence[BlockReport] = ()
    converted: bool = False
    refusals: Sequence[Refusal] = ()
    proof: Sequence[str] = ()
    cost: sympy.Expr = field(default=sympy.Integer(0))
    cost_before: sympy.Expr = field(default=sympy.Integer(0))
    flops: int = 0
    flops_before: int = 0
    tokens: int = 0
    kept: int = 0
    failed: bool = False
    load: Load | None = None
    load_before: Load | None = None


@dataclass(frozen=True)
class Report:
    """All graphs of a model, in the order in which they were captured.

    Attributes:
        graphs: One each.
        extra: What was left alone outside of them.
        machine: What :func:`tokenpass.calibrate` measured; without it no time is predicted.
    """

    graphs: Sequence[GraphReport]
    extra: Sequence[Refusal] = ()
    machine: Calibration | None = None

    @property
    def attentions(self) -> list[Attention]:
        return [match for graph in self.graphs for match in graph.attentions]

    @property
    def mlps(self) -> list[Mlp]:
        return [match for graph in self.graphs for match in graph.mlps]

    @property
    def blocks(self) -> list[Block]:
        return [row.block for graph in self.graphs for row in graph.blocks]

    @property
    def converted(self) -> bool:
        """Whether the method changes at least one block."""
        return any(graph.converted for graph in self.graphs)

    @property
    def refusals(self) -> list[Refusal]:
        return [item for graph in self.graphs for item in graph.refusals] + list(self.extra)

    @property
    def cost(self) -> sympy.Expr:
        """FLOPs as a polynomial in the token counts ``n0``, ``n1``, ..."""
        return sympy.Add(*(graph.cost for graph in self.graphs))

    @property
    def flops(self) -> int:
        return sum(graph.flops for graph in self.graphs)

    @property
    def flops_before(self) -> int:
        return sum(graph.flops_before for graph in self.graphs)

    @property
    def predicted_ms(self) -> float | None:
        """Milliseconds that a call should take under Inductor; ``None`` if nothing is known."""
        return self._predicted([graph.load for graph in self.graphs])

    @property
    def predicted_ms_before(self) -> float | None:
        """The same without the rewrite."""
        return self._predicted([graph.load_before for graph in self.graphs])

    def _predicted(self, loads: Sequence[Load | None]) -> float | None:
        known = [load for load in loads if load is not None]
        if self.machine is None or len(known) < len(loads):
            return None
        return 1e3 * sum(self.machine.seconds(load) for load in known)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
        console.print(self._summary(), highlight=False)
        for graph in self.graphs:
            if graph.blocks:
                console.print(_block_table(graph))
            for line in graph.proof:
                console.print(f"  {line}", highlight=False, markup=False, overflow="fold")
        if self.refusals:
            console.print(_refusal_table(self.refusals))
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def _summary(self) -> str:
        share = self.flops / self.flops_before if self.flops_before else 1.0
        state = "converted" if self.converted else "left as it is"
        before, after = self.predicted_ms_before, self.predicted_ms
        predicted = ""
        if before is not None and after is not None:
            predicted = f"\npredicted: {before:.1f} -> {after:.1f} ms a call on this machine"
        return (
            f"{_count(self.blocks, 'block')}, {_count(self.attentions, 'attention')}, "
            f"{_count(self.mlps, 'MLP')} in {_count(self.graphs, 'graph')}: {state}.\n"
            f"{_giga(self.flops_before)} -> {_giga(self.flops)} GFLOPs ({share:.3f})"
            f"{predicted}"
        )


def _count(items: Sequence[object], word: str) -> str:
    return f"{len(items)} {word}" + ("" if len(items) == 1 else "s")


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.3f}"


def _block_table(graph: GraphReport) -> Table:
    table = Table(box=None, pad_edge=False, width=WIDTH)
    for title, ratio in (("block", 1), ("tokens", 3), ("attention", 2), ("mlp", 4), ("from", 8)):
        table.add_column(title, ratio=ratio, no_wrap=True, overflow="ellipsis")
    for number, row in enumerate(graph.blocks, 1):
        tokens = str(row.tokens_in)
        if row.tokens_out != row.tokens_in:
            tokens += f" -> {row.tokens_out}"
        if row.updated is not None:
            tokens += f", {row.updated} updated"
        attention = "fused" if row.block.attention.fused else "written out"
        mlp = row.block.mlp
        linears = "none" if mlp is None else f"{len(mlp.linears)} linears"
        gated = ", gated" if mlp is not None and mlp.gated else ""
        table.add_row(
            str(number), tokens, attention, linears + gated, short_place(row.block.attention.place)
        )
    return table


def _refusal_table(refusals: Sequence[Refusal]) -> Table:
    table = Table(box=None, pad_edge=False, width=WIDTH)
    table.add_column("left alone", ratio=6)
    table.add_column("node", ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column("from", ratio=4, no_wrap=True, overflow="ellipsis")
    for item in refusals:
        table.add_row(item.reason, item.node, short_place(item.place))
    return table
