"""Figures of what tokenpass did: ``tokenpass.plot.tokens(image, kept, grid)`` and others.

Every function returns a matplotlib ``Figure`` that is readable at 600 pixels and does not rely on
telling red from green. Needs matplotlib: ``pip install 'tokenpass[cli]'``.
"""

from tokenpass.plot.curves import flow, pareto, timeline
from tokenpass.plot.pictures import merge_map, tokens, updated, updated_share

__all__ = ["flow", "merge_map", "pareto", "timeline", "tokens", "updated", "updated_share"]
