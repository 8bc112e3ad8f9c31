"""Where the patch tokens lie among all tokens, as a report says it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenpass.report import GraphReport


@dataclass(frozen=True)
class Tokens:
    """Where patch tokens lie among all tokens.

    Attributes:
        before: Prefix tokens ahead of them.
        count: Patch tokens.
        total: All tokens.
    """

    before: int
    count: int
    total: int


def tokens_of(report: GraphReport) -> Tokens | None:
    """From the trail of the analysis; ``None`` where attention is not among all patch tokens."""
    if any("attention stays on all" in line for line in report.proof):
        return None
    lines = [line for line in report.proof if line.startswith("one token axis")]
    if not lines:
        return None
    parts = [(int(size), kind) for size, kind in re.findall(r"(\d+) (prefix|patch)", lines[0])]
    kinds = [kind for _, kind in parts]
    if kinds.count("patch") != 1:
        return None
    before = sum(size for size, _ in parts[: kinds.index("patch")])
    total = sum(size for size, _ in parts)
    return Tokens(before, report.tokens, total)
