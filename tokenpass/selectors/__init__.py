"""Ways to choose visual tokens, for ``tokenpass.vlm(model, selector=...)``.

A selector is a pure function of the visual tokens of one image and of the number that may stay; one
of your own needs no entry here.
"""

from tokenpass.selectors.class_attention import class_attention
from tokenpass.selectors.determinantal import determinantal
from tokenpass.selectors.divprune import divprune
from tokenpass.selectors.random_tokens import random_tokens
from tokenpass.selectors.uniform_grid import uniform_grid
from tokenpass.selectors.visionzip import visionzip

__all__ = [
    "class_attention",
    "determinantal",
    "divprune",
    "random_tokens",
    "uniform_grid",
    "visionzip",
]
