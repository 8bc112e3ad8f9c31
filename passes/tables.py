"""Values that run along the tokens but are the same for all images: position tables, biases.

A computation on fewer tokens meets the rows of the tokens that are left.
"""

from __future__ import annotations

from torch import Tensor, fx

from tokenpass.dims import Dim, Dims
from tokenpass.facts import Facts
from tokenpass.grid import Grid
from tokenpass.layout import Layout
from tokenpass.passes.conversions import Conversions


class Tables:
    """Takes the rows that are needed, once."""

    def __init__(self, facts: Facts, grid: Grid, layout: Layout, convert: Conversions) -> None:
        self._facts = facts
        self._grid = grid
        self._layout = layout
        self._convert = convert
        self._met: dict[tuple[object, ...], Tensor] = {}

    def meet(
        self, x: Tensor, source: fx.Node, seen: Dims, version: int, of_keys: int, *, carries: bool
    ) -> Tensor:
        """What ``source`` computed, as a computation on the tokens of ``version`` needs it.

        Args:
            x: What it computed.
            source: A value of the original.
            seen: The dimensions of the computation, at least as many.
            version: Of the tokens of the computation.
            of_keys: Of those along its last dimension.
            carries: Whether ``x`` has tokens of its own, those of ``version`` already; a table may
                run beside them, like a bias of each query for keys that count or do not.
        """
        own = self._facts.dims(source)
        done = frozenset(self._grid.carried_in(own)) if carries else frozenset[int]()
        lined = seen[len(seen) - len(own) :]
        if not any(
            dim and place not in done and self._grid.carried_by(lined[place])
            for place, dim in enumerate(own)
        ):
            return x

        def index(dim: Dim, place: int) -> Tensor:
            return self._convert.table_rows(dim, of_keys if place == len(seen) - 1 else version)

        key = (source, seen, version, of_keys)
        if key not in self._met:
            self._met[key] = self._layout.meet(x, own, seen, index, done)
        return self._met[key]
