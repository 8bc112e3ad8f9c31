"""Draws encoders: each field of a spec among its choices, the plainest one more often."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.spec import Attention, Block, Case, Encoder

DEPTHS = (1, 1, 2, 2, 3)
"""Blocks, as often as they are drawn."""

SEEDS = 1000


def _of(item: Field[Any]) -> st.SearchStrategy[Any]:
    first, *others = item.metadata["choices"]
    return st.sampled_from([first] * item.metadata["plain"] + others)


def _drawn(spec: type[Any], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    known = {i.name: _of(i) for i in fields(spec) if "choices" in i.metadata}
    return st.builds(spec, **known, **given)


blocks = _drawn(Block, attention=_drawn(Attention))

encoders: st.SearchStrategy[Encoder] = _drawn(
    Encoder,
    blocks=st.sampled_from(DEPTHS).flatmap(lambda n: st.tuples(*[blocks] * n)),
    seed=st.integers(0, SEEDS),
)

cases: st.SearchStrategy[Case] = _drawn(Case, encoder=encoders)
