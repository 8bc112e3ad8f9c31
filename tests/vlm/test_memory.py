"""Scoring holds no attention map."""

from __future__ import annotations

import subprocess
import sys

TOKENS = 16_384
"""Patch tokens; one attention map of a head would take 1 GB."""

LIMIT_MB = 200

SCRIPT = f"""
import resource, torch
from torch import nn
from tokenpass.vision_attention import AttentionWatch

torch.set_num_threads(1)
query = torch.randn(1, 4, {TOKENS}, 16)

class Layer(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)

layer = Layer()
with torch.no_grad():
    layer(query)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with AttentionWatch([1]) as watch:
        layer(query)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(found,) = watch.layers.values()
assert abs(float(found.received[0].sum()) - 1) < 1e-3
print(after - before)
"""


def test_scoring_needs_little_memory() -> None:
    """Breaks if scores are computed from a whole map."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(run.stdout) / 1024 <= LIMIT_MB
