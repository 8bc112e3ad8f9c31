"""Wall time in turns: the package's own, under the name that benchmarks use."""

from tokenpass.timing import Call, Times, interleaved, once, synchronise

__all__ = ["Call", "Times", "interleaved", "once", "synchronise"]
