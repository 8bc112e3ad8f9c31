"""The same rewrite for ``torch.export`` programs."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from tokenpass import export_torch_internals as export_internals
from tokenpass.errors import OptionError
from tokenpass.methods import Eventful, HiPrune, Method
from tokenpass.pipeline import Rewrite, undone
from tokenpass.pipeline import rewrite as rewrite_graph
from tokenpass.programs import inputs_of, program_of
from tokenpass.report import GraphReport
from tokenpass.runtime import warn_of_nothing


def rewrite(
    program: ExportedProgram, method: Method | None = None, *, always_rewrite: bool = False
) -> ExportedProgram:
    """Prune tokens in an exported program.

    The result takes the same inputs, of the same sizes (a dynamic batch stays dynamic), and has the
    same parameters, buffers and constants. It consists of ATen operators alone, so it can be saved,
    loaded and compiled ahead of time where there is no tokenpass and no Python. Its budget is
    fixed. What cannot be converted comes back as it was, with one warning;
    ``tokenpass.explain(program, method=...)`` says more.

    Args:
        program: From ``torch.export.export``.
        method: What to do with the tokens; default ``HiPrune()``.
        always_rewrite: Rewrite at full budget too, and where the cost model says it does not pay.

    Raises:
        OptionError: If the method does not fit the program.
    """
    wanted = applicable(method)
    made = _rewritten(program, wanted, always=always_rewrite, dry=False)
    if made.module is None:
        if not wanted.full:
            warn_of_nothing(made.report)
        return program
    inputs = inputs_of(program)
    try:
        with export_internals.no_new_guards(inputs.mode), torch.enable_grad():
            return program_of(program, made.module, inputs)
    except Exception as error:
        undone(made, error)
        return program


def planned(program: ExportedProgram, method: Method | None) -> GraphReport:
    """What :func:`rewrite` would do."""
    return _rewritten(program, applicable(method), always=False, dry=True).report


def applicable(method: Method | None) -> HiPrune:
    """The method, or the default one.

    Raises:
        OptionError: If an exported program cannot hold it.
    """
    wanted = method or HiPrune()
    if isinstance(wanted, Eventful):
        raise OptionError(
            "Eventful keeps state between frames, full and partial ones are different graphs, and "
            "which of them runs depends on the frame: an exported program is one graph without "
            "state. Use torch.compile, or HiPrune"
        )
    wanted.check_applicable()
    return wanted


def _rewritten(program: ExportedProgram, method: HiPrune, *, always: bool, dry: bool) -> Rewrite:
    inputs = inputs_of(program)
    with export_internals.no_new_guards(inputs.mode), torch.enable_grad():
        return rewrite_graph(program.graph_module, inputs, method, always=always, dry=dry)
