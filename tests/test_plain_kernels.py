"""The custom operators written out: numbers, and steps that bound the memory."""

from __future__ import annotations

import pytest
import torch

from tokenpass import plain_kernels


def _problem() -> tuple[torch.Tensor, ...]:
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 9, 4)
    return query, key, torch.randn(2, 9), torch.randn(1, 3, 7, 9)


@pytest.mark.parametrize("step", [1, 200, 2**30], ids=["a row", "some rows", "all"])
@pytest.mark.parametrize("boolean", [False, True])
def test_received_attention_is_the_mean_of_the_maps(
    step: int, boolean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a step takes wrong rows, or a bias goes to queries; reference in float64."""
    monkeypatch.setattr(plain_kernels, "STEP_BYTES", step)
    query, key, bias, mask = _problem()
    scores = query.double() @ key.double().mT * 0.3 + bias.double()[:, None, None]
    given = mask > -1 if boolean else mask
    scores = scores.masked_fill(~given, -torch.inf) if boolean else scores + mask
    wanted = scores.softmax(-1).mean((1, 2))
    got = plain_kernels.received(query, key, 0.3, bias, given)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [1, 100, 2**30], ids=["a row", "some rows", "all"])
def test_the_most_similar_token(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if similarity is no cosine, or a step takes wrong rows."""
    monkeypatch.setattr(plain_kernels, "STEP_BYTES", step)
    tokens, among = torch.randn(2, 7, 5), torch.randn(2, 6, 5) * torch.arange(1, 7)[:, None]
    pairs = torch.cosine_similarity(tokens[:, :, None].double(), among[:, None].double(), dim=-1)
    assert torch.equal(plain_kernels.similar(tokens, among), pairs.argmax(-1))
