"""The properties notice what goes wrong: each fault of :mod:`tests.fuzz.faults` is caught."""

from __future__ import annotations

import pytest

from tests.fuzz.faults import FAULTS
from tests.fuzz.properties import check
from tests.fuzz.simplify import error_of


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the properties became blind to a wrong rewrite."""
    FAULTS[name].put_in(monkeypatch)
    assert error_of(FAULTS[name].case)


@pytest.mark.parametrize("case", sorted({str(fault.case) for fault in FAULTS.values()}))
def test_without_a_fault_nothing_is_caught(case: str) -> None:
    """Breaks if a case fails whether there is a fault or not."""
    check(next(fault.case for fault in FAULTS.values() if str(fault.case) == case))
