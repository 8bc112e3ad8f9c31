"""When exchanging keys in a running softmax is faster than attention anew, and what it costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenpass.gates import FEWEST, Count

REFRESH_FRAMES = 64
"""In so many frames, as many rows as there are get a turn of being computed anew.

Errors of frames are independent, so they grow with the square root of their number: 64 frames have
eight times the error of one. A turn for each row costs 1/64 of dense attention in each frame.
"""

EXCHANGE_COST, COMPILED_EXCHANGE_COST = 3.4, 2.0
"""Work for a changed token, in rows of dense attention: old key, new key, its row, merging; by
tensor operations that a compiler fuses, and by code that was compiled for it."""

OVERHEAD, COMPILED_OVERHEAD = 220, 80
"""Work that does not depend on the number of changed tokens, in rows of dense attention."""


def refreshed(tokens: int) -> int:
    """Unchanged rows that each frame computes anew."""
    return -(-tokens // REFRESH_FRAMES)


def pays(tokens: int, changed: Count | Tensor, *, compiled: bool) -> Any:
    """Whether exchanging ``changed`` of ``tokens`` keys is faster than dense attention.

    Milliseconds by share of changed tokens (x86 with AVX-512, two threads, float32, 6 heads of
    width 64). By tensor operations under Inductor, against the fused attention of PyTorch:

    | tokens | dense | 2 % | 5 % | 10 % | 20 % | 30 % | break-even |
    | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
    | 196 | 1.0 | 1.1 | 1.0 | 1.1 | 1.3 | 1.5 | never |
    | 400 | 2.9 | 1.9 | 1.9 | 2.0 | 2.7 | 3.4 | 22 % |
    | 784 | 9.2 | 3.5 | 4.1 | 5.4 | 8.9 | 13 | 21 % |
    | 1764 | 43 | 9.6 | 14 | 22 | 36 | 52 | 24 % |
    | 4096 | 225 | 34 | 57 | 96 | 179 | 279 | 25 % |

    By compiled code (:mod:`tokenpass.native`), against the same for all rows:

    | tokens | dense | 2 % | 5 % | 10 % | 20 % | 30 % | 40 % | break-even |
    | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
    | 196 | 0.74 | 0.37 | 0.41 | 0.47 | 0.67 | 0.75 | 0.84 | 30 % |
    | 400 | 2.4 | 0.68 | 0.96 | 1.2 | 1.8 | 2.1 | 2.6 | 37 % |
    | 784 | 9.7 | 1.6 | 2.5 | 3.5 | 5.7 | 7.6 | 8.9 | 44 % |
    | 1764 | 46 | 4.8 | 8.6 | 13 | 19 | 26 | 31 | 50 % |
    | 4096 | 197 | 21 | 37 | 63 | 118 | 140 | 178 | 45 % |
    """
    each = COMPILED_EXCHANGE_COST if compiled else EXCHANGE_COST
    overhead = COMPILED_OVERHEAD if compiled else OVERHEAD
    return each * changed + refreshed(tokens) + overhead <= tokens


def pairs(tokens: int, changed: int, *, compiled: bool) -> int:
    """Queries times keys that an update compares; rows beyond the limit are not foreseen."""
    if not pays(tokens, changed, compiled=compiled):
        return tokens * tokens
    rows = changed + refreshed(tokens)
    if compiled:
        return 2 * changed * (tokens - changed) + min(rows, tokens) * tokens
    return (2 * changed + rows) * tokens


def exchange_count(tokens: int, changed: Count) -> Count:
    """How many of the changed keys a fused graph exchanges: all, or a few where that is slow."""
    return changed if changed <= FEWEST or pays(tokens, changed, compiled=False) else FEWEST


def traced_exchange_count(tokens: int, changed: Count) -> Count:
    """The same of a number that is only known when a traced graph runs, and at least FEWEST."""
    every = torch.scalar_tensor(changed, dtype=torch.int64)
    chosen = torch.where(pays(tokens, every, compiled=False), every, FEWEST)
    found: Count = chosen.item()  # type: ignore[assignment]
    torch._check(found >= FEWEST)  # type: ignore[no-untyped-call]
    torch._check(found <= changed)  # type: ignore[no-untyped-call]
    return found


def most_exchanged(tokens: int) -> int:
    """The largest :func:`exchange_count`."""
    return max(FEWEST, int((tokens - OVERHEAD - refreshed(tokens)) / EXCHANGE_COST))
