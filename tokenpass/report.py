"""What was found, what is done with it, what it costs: printed by ``explain``."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenpass import markup
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
        hint: The change to the model or the call that would help, where there is one.
    """

    reason: str
    node: str = ""
    stack: str = ""
    hint: str = ""

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

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Tokens, kind of attention and MLP, and source line, in words."""
        tokens = str(self.tokens_in)
        if self.tokens_out != self.tokens_in:
            tokens += f" -> {self.tokens_out}"
        if self.updated is not None:
            tokens += f", {self.updated} updated"
        attentions = self.block.attentions
        attention = "none" if not attentions else "fused" if attentions[0].fused else "written out"
        mlp = self.block.mlp
        linears = "none" if mlp is None else f"{len(mlp.linears)} linears"
        gated = ", gated" if mlp is not None and mlp.gated else ""
        return tokens, attention, linears + gated, short_place(self.block.place)


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
        grid: Patch tokens along each axis of their grid; empty if there is none.
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
    grid: Sequence[int] = ()
    tokens: int = 0
    kept: int = 0
    failed: bool = False
    load: Load | None = None
    load_before: Load | None = None

    @property
    def changed(self) -> int:
        """Blocks that the method changes: fewer tokens leave, or a gate is in front."""
        if not self.converted:
            return 0
        return sum(row.updated is not None or row.tokens_out < self.tokens for row in self.blocks)


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
    def grid(self) -> Sequence[int]:
        """Patch tokens along each axis of their grid; empty if there is none."""
        return next((graph.grid for graph in self.graphs if graph.grid), ())

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
        return self.text()

    def text(self, width: int = WIDTH) -> str:
        """Summary, blocks, proof and refusals in so many columns at most."""
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self._summary(), highlight=False)
        for graph in self.graphs:
            if graph.blocks:
                console.print(_block_table(graph, width))
            for line in graph.proof:
                console.print(f"  {line}", highlight=False, markup=False, overflow="fold")
        if self.refusals:
            console.print(_refusal_table(self.refusals, width))
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        rows = [row for graph in self.graphs for row in graph.blocks]
        flows = [markup.Flow(row.tokens_in, row.tokens_out, row.updated) for row in rows]
        proof = [line for graph in self.graphs for line in graph.proof]
        cells = [(number, *row.cells) for number, row in enumerate(rows, 1)]
        summary = "<br>".join(map(markup.text, self._summary().splitlines()))
        parts = [f"<style>{markup.STYLE}</style>", f"<p>{summary}</p>"]
        if rows:
            parts += [
                markup.flow_figure(flows),
                markup.table(BLOCK_COLUMNS, cells),
            ]
        if proof:
            parts.append(
                markup.details("How the patch tokens were found", markup.preformatted(proof))
            )
        parts += _refusal_details(self.refusals)
        return f"<div class=tokenpass>{''.join(parts)}</div>"

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


BLOCK_COLUMNS = ("block", "tokens", "attention", "mlp", "from")


def _block_table(graph: GraphReport, width: int) -> Table:
    table = Table(box=None, pad_edge=False, width=width)
    for title in BLOCK_COLUMNS:
        rest = 1 if title == BLOCK_COLUMNS[-1] else None
        table.add_column(title, ratio=rest, no_wrap=True, overflow="ellipsis")
    for number, row in enumerate(graph.blocks, 1):
        table.add_row(str(number), *row.cells)
    return table


def _refusal_details(refusals: Sequence[Refusal]) -> list[str]:
    """For each reason what opens to show the nodes at fault and their source lines."""
    parts = [f"<p>{_count(refusals, 'refusal')}</p>"]
    for reason, count in Counter(item.reason for item in refusals).items():
        places = [item for item in refusals if item.reason == reason and item.node + item.stack]
        lines = [f"{item.node}\n{item.stack.rstrip()}\n" for item in places]
        body = markup.preformatted(lines) if lines else "<p>No node is at fault.</p>"
        parts.append(markup.details(reason if count == 1 else f"{reason} ({count} times)", body))
    return parts


def _refusal_table(refusals: Sequence[Refusal], width: int) -> Table:
    table = Table(box=None, pad_edge=False, width=width)
    table.add_column("left alone", ratio=6)
    table.add_column("node", ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column("from", ratio=4, no_wrap=True, overflow="ellipsis")
    alike: dict[tuple[str, str], list[Refusal]] = {}
    for item in refusals:
        alike.setdefault((item.reason, item.hint), []).append(item)
    for (reason, hint), items in alike.items():
        more = f", +{len(items) - 1}" if len(items) > 1 else ""
        what = f"{reason}\n  -> {hint}" if hint else reason
        table.add_row(Text(what), items[0].node, short_place(items[0].place) + more)
    return table
