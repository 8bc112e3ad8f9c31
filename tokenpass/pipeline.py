"""The steps from Dynamo's graph to the rewritten one, in order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from tokenpass import compiler_torch_internals as compiler_internals
from tokenpass.analysis import Analysis, Inputs, analyse, for_these_sizes
from tokenpass.arrivals import Arrivals, Handover
from tokenpass.blocks import Block, NoMatch
from tokenpass.errors import NotUnderstoodError, OptionError, TokenpassWarning, described
from tokenpass.graph import expression
from tokenpass.logs import log
from tokenpass.methods import DEFAULT_KEEP, HiPrune
from tokenpass.partial import PartialPruning
from tokenpass.passes.any_tokens import around_any_tokens
from tokenpass.passes.check import check_rewrite, check_same_outputs
from tokenpass.passes.cost import cost_after, cost_before, evaluate
from tokenpass.passes.functionalise import written_values
from tokenpass.passes.load import load_after, load_before
from tokenpass.passes.plan_partial import partial_cost, partial_flops, plan_partial
from tokenpass.passes.plan_pruning import PATTERN, plan_pruning
from tokenpass.passes.prune import prune
from tokenpass.passes.prune_partly import prune_partly
from tokenpass.passes.versions import Versions, decide_versions
from tokenpass.proof import proof, tokens_line
from tokenpass.pruning import Pruning
from tokenpass.reasons import BATCH_OF_ANY_SIZE, GRID_OF_ANY_SIZE, does_not_pay, hint_of
from tokenpass.report import BlockReport, GraphReport, Refusal


@dataclass(frozen=True)
class Rewrite:
    """What a method makes of a graph.

    Attributes:
        module: The rewritten graph; ``None`` where the original stays.
        plan: The cuts, if there are any.
        report: For the user.
        batch: Where the number of images can be read: pairs of input and dimension.
        handover: What the graph takes from other graphs, and tells them.
    """

    module: fx.GraphModule | None
    plan: Pruning | PartialPruning | None
    report: GraphReport
    batch: tuple[tuple[int, int], ...] = ()
    handover: Handover = field(default_factory=Handover)


def plan(analysis: Analysis, method: HiPrune, *, always: bool) -> Rewrite:
    """Decide what to do and predict its cost; rewrite nothing.

    Args:
        analysis: Of the graph.
        method: What was asked for.
        always: Rewrite at full budget too, and where it does not pay.
    """
    facts, found = analysis.facts, analysis.found
    report = base_report(analysis)
    if analysis.sizes_open:
        nodes = () if found.embedding is None else (found.embedding.out,)
        return _left(report, refusal_of(NoMatch(PATTERN, GRID_OF_ANY_SIZE, nodes)))
    decided = plan_pruning(facts, found, method, analysis.extent, analysis.hint)
    if isinstance(decided, NoMatch):
        return _left(report, refusal_of(decided))
    if method.full and not always:
        return Rewrite(None, None, report)
    return _with_costs(analysis, decided, report, always=always)


def base_report(analysis: Analysis) -> GraphReport:
    """What was found in a graph, and its cost as it is."""
    facts, found = analysis.facts, analysis.found
    before = cost_before(facts, found.grid)
    report = GraphReport(
        attentions=found.attentions,
        mlps=found.mlps,
        blocks=_untouched(analysis, found.blocks),
        refusals=[refusal_of(miss) for miss in found.misses],
        proof=proof(facts, found),
        cost=before,
        cost_before=before,
    )
    if found.grid is not None:
        tokens = analysis.hint(found.grid.count)
        grid = tuple(analysis.hint(size) for size in found.grid.shape)
        report = replace(report, grid=grid, tokens=tokens, kept=tokens)
    number = evaluate(before, {0: report.tokens}, analysis.hint)
    return replace(report, flops=number, flops_before=number)


def _with_costs(
    analysis: Analysis, decided: Pruning, report: GraphReport, *, always: bool
) -> Rewrite:
    versions = _versions(analysis, decided)
    cost = cost_after(analysis.facts, decided, versions)
    counts = {v: analysis.hint(decided.count(v)) for v in range(len(decided.stages) + 1)}
    flops = evaluate(cost, counts, analysis.hint)
    if decided.method.where == "encoder" and flops >= report.flops_before and not always:
        reason = does_not_pay(flops, report.flops_before)
        at = tuple(stage.at for stage in decided.stages if stage.at is not None)
        return _left(report, refusal_of(NoMatch(PATTERN, reason, at)))
    report = replace(
        report,
        converted=True,
        blocks=_with_tokens(decided, versions, counts),
        cost=cost,
        flops=flops,
        kept=counts[len(decided.stages)],
    )
    return Rewrite(None, decided, report)


# ------------------------------------------------------------ attention that stays on all tokens


def _needs_all_tokens(analysis: Analysis) -> bool:
    """Whether most attentions of a graph can go without no token: in windows, over pooled keys."""
    found = analysis.found
    return bool(found.attentions) and 2 * len(found.over_grid) < len(found.attentions)


def plan_partly(analysis: Analysis, method: HiPrune, *, always: bool) -> Rewrite:
    """As :func:`plan`, where tokens leave the token-wise parts only; all sizes are numbers."""
    facts, found = analysis.facts, analysis.found
    report = base_report(analysis)
    captured = analysis.captured
    piece = captured.is_piece
    around = around_any_tokens(facts, found, captured.constants, with_norms=False, cut_off=piece)
    report = replace(report, mlps=around.mlps)
    plans = plan_partial(facts, around, method, piece=piece)
    if isinstance(plans, NoMatch):
        return _left(report, refusal_of(plans))
    decided = min(plans, key=lambda plan: partial_flops(facts, plan))
    flops = partial_flops(facts, decided)
    if flops >= report.flops_before and not always:
        reason = does_not_pay(flops, report.flops_before)
        at = tuple(cut.at for cut in decided.cuts)
        return _left(report, refusal_of(NoMatch(PATTERN, reason, at)))
    whose = "images" if decided.packed else "image"
    changed = replace(
        report,
        converted=True,
        proof=[
            tokens_line(decided.shape, packed=decided.packed),
            f"attention stays on all; {len(decided.regions)} token-wise regions run on fewer",
            f"ranked by their distance from the mean token of the {whose}",
        ],
        blocks=_partial_blocks(decided),
        cost=partial_cost(facts, decided),
        cost_before=expression(report.flops_before),
        flops=flops,
        grid=decided.shape,
        tokens=decided.patches,
        kept=decided.count(len(decided.cuts)),
    )
    return Rewrite(None, decided, changed)


def _partial_blocks(decided: PartialPruning) -> list[BlockReport]:
    rows: list[BlockReport] = []
    version = 0
    cut_in = {cut.block: cut.number for cut in decided.cuts}
    for number, block in enumerate(decided.blocks, 1):
        entering, version = version, cut_in.get(number, version)
        rows.append(BlockReport(block, decided.count(entering), decided.count(version)))
    return rows


def _is_one_block(analysis: Analysis) -> bool:
    """Whether a graph is one block of a model, and may serve all of them: cuts have no order."""
    return len(analysis.found.blocks) == 1 and analysis.captured.is_piece


def _could_be_made(analysis: Analysis, planned: Rewrite, method: HiPrune, always: bool) -> bool:
    """Whether only the cost model stands in the way of a plan, if anything does."""
    if planned.plan is not None or always:
        return planned.plan is not None
    return plan(analysis, method, always=True).plan is not None


def _cheaper_partly(analysis: Analysis, numbers: Analysis, method: HiPrune) -> bool:
    """Whether partial pruning saves more, at a budget below the full one."""
    probe = method.with_budget(DEFAULT_KEEP) if method.full else method
    whole = plan(analysis, probe, always=True).report.flops
    return plan_partly(numbers, probe, always=True).report.flops < whole


def _versions(analysis: Analysis, decided: Pruning) -> Versions:
    pinned = written_values(analysis.captured.module.graph)
    return decide_versions(analysis.facts, decided, pinned)


def _untouched(analysis: Analysis, blocks: Sequence[Block]) -> list[BlockReport]:
    grid = analysis.found.grid
    tokens = analysis.hint(grid.count) if grid is not None else 0
    return [BlockReport(block, tokens, tokens) for block in blocks]


def _with_tokens(decided: Pruning, versions: Versions, counts: dict[int, int]) -> list[BlockReport]:
    rows: list[BlockReport] = []
    cuts = {stage.at: stage.number for stage in decided.stages if stage.at is not None}
    for block in decided.found.blocks:
        entering = versions.level[block.attention.softmax]
        leaving = cuts.get(block.out, versions.level[block.out])
        rows.append(BlockReport(block, counts[entering], counts[leaving]))
    return rows


def _left(report: GraphReport, refusal: Refusal) -> Rewrite:
    return Rewrite(None, None, refused(report, refusal))


def refused(report: GraphReport, refusal: Refusal) -> GraphReport:
    """``report`` with one more refusal."""
    return replace(report, refusals=[*report.refusals, refusal])


def refusal_of(miss: NoMatch) -> Refusal:
    """A failed match in the words of the report."""
    name = miss.nodes[0].name if miss.nodes else ""
    stacks = (node.meta.get("stack_trace") for node in miss.nodes)
    stack = next((stack for stack in stacks if stack), "")
    return Refusal(f"{miss.pattern}: {miss.reason}", name, stack, hint_of(miss.reason))


def rewrite(
    module: fx.GraphModule,
    inputs: Inputs,
    method: HiPrune,
    *,
    always: bool,
    rewriting: bool = True,
    dry: bool = False,
    record: bool = False,
    steady: bool = False,
    arrivals: Arrivals = (),
) -> Rewrite:
    """Analyse, plan, rewrite and check.

    Whatever fails in here leaves the original in place and says so.

    Args:
        module: Dynamo's graph.
        inputs: Its example inputs.
        method: What was asked for.
        always: Rewrite at full budget too, and where it does not pay.
        rewriting: Whether the grid may be fixed to the one at hand.
        dry: Only plan.
        record: Whether the graph also returns what each cut did.
        steady: Whether gates follow, in front of which tokens keep their places.
        arrivals: What is known of the inputs that other graphs handed over.

    Raises:
        OptionError: If the method does not fit the model.
    """
    planned = Rewrite(None, None, GraphReport())
    try:
        analysis = analyse(module, inputs, rewriting=rewriting, arrivals=arrivals)
        planned = replace(plan(analysis, method, always=always), batch=analysis.batch_inputs())
        if always or not method.full:
            analysis, planned = _with_partial(analysis, planned, method, module, inputs, always)
        planned = replace(planned, handover=analysis.handover())
        if dry:
            return replace(planned, report=_with_loads(analysis, planned))
        if planned.plan is None:
            return planned
        decided = planned.plan
        if steady and isinstance(decided, Pruning):
            decided = replace(decided, steady=True)
        rewritten = _rewritten(analysis, decided, record)
    except Exception as error:
        if isinstance(error, OptionError) or compiler_internals.steers_compilation(error):
            raise
        return undone(planned, error)
    return replace(planned, module=rewritten)


def _with_loads(analysis: Analysis, planned: Rewrite) -> GraphReport:
    """The report of a plan with what it asks of the machine, which partial pruning does not say."""
    before = load_before(analysis.facts, analysis.found.grid, analysis.hint)
    after = before if planned.plan is None else None
    if isinstance(decided := planned.plan, Pruning):
        after = load_after(analysis.facts, decided, _versions(analysis, decided), analysis.hint)
    return replace(planned.report, load=after, load_before=before)


def _with_partial(
    analysis: Analysis,
    planned: Rewrite,
    method: HiPrune,
    module: fx.GraphModule,
    inputs: Inputs,
    always: bool,
) -> tuple[Analysis, Rewrite]:
    """``planned``, or the partial pruning that can be made where it cannot, or saves less."""
    if not analysis.found.attentions and not analysis.captured.is_piece:
        return analysis, planned  # no block, and no reason to make numbers of its sizes
    partly = _needs_all_tokens(analysis) or _is_one_block(analysis)
    if not partly and _could_be_made(analysis, planned, method, always):
        return analysis, planned
    numbers = for_these_sizes(analysis, module, inputs)
    if numbers is None:
        why = refusal_of(NoMatch(PATTERN, BATCH_OF_ANY_SIZE, ()))
        return analysis, replace(planned, report=refused(planned.report, why))
    instead = replace(plan_partly(numbers, method, always=always), batch=numbers.batch_inputs())
    if instead.plan is None:
        if planned.plan is None:
            why = instead.report.refusals[-1]
            planned = replace(planned, report=refused(planned.report, why))
        return analysis, planned
    needed = planned.plan is None or _is_one_block(analysis)
    if needed or _cheaper_partly(analysis, numbers, method):
        return numbers, instead
    return analysis, planned


def _rewritten(
    analysis: Analysis, decided: Pruning | PartialPruning, record: bool
) -> fx.GraphModule:
    captured, facts = analysis.captured, analysis.facts
    each = (1 + decided.method.merges) * record
    if isinstance(decided, PartialPruning):
        module = prune_partly(captured, facts, decided, record=record)
        kept, recorded = decided.count(len(decided.cuts)), each * len(decided.cuts)
        check_same_outputs(captured, module, kept, recorded)
        return module
    module = prune(captured, facts, decided, _versions(analysis, decided), record=record)
    check_rewrite(captured, facts, decided, module, each * len(decided.stages))
    return module


def undone(planned: Rewrite, error: Exception) -> Rewrite:
    """The original graph instead of a rewrite that failed, with one warning and a refusal.

    A graph that cannot be understood is a refusal alone.
    """
    report = given_up(planned.report, error)
    return Rewrite(None, None, report, planned.batch, planned.handover)


def given_up(report: GraphReport, error: Exception) -> GraphReport:
    """The report of a graph that is left as it is because of an error."""
    if isinstance(error, NotUnderstoodError):
        return refused(report, Refusal(str(error)))
    return failed(report, error)


def failed(report: GraphReport, error: Exception) -> GraphReport:
    """The report of a rewrite that failed and was undone; warns."""
    reason = f"the rewrite failed and was undone: {described(error)}"
    log.debug("rewrite undone", exc_info=error)
    warnings.warn(f"tokenpass: {reason}", TokenpassWarning, stacklevel=2)
    blocks = [
        replace(row, tokens_in=report.tokens, tokens_out=report.tokens) for row in report.blocks
    ]
    report = replace(
        report,
        converted=False,
        blocks=blocks,
        cost=report.cost_before,
        flops=report.flops_before,
        kept=report.tokens,
        failed=True,
    )
    return refused(report, Refusal(reason))
