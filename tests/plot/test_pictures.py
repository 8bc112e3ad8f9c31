"""Breaks if a kept patch is drawn as a dropped one, or a merged one in another group's colour."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tokenpass import plot
from tokenpass.errors import OptionError
from tokenpass.plot import pictures

GRID = (2, 3)
BLACK = np.zeros((4, 6, 3))


def pixels(figure: Figure) -> Any:
    """What the figure shows in its first panel, ``(H, W, 3)``."""
    return np.asarray(figure.axes[0].images[0].get_array())


def test_kept_patches_keep_their_colours() -> None:
    photo = np.full((4, 6, 3), (0.8, 0.4, 0.0), np.float32)
    shown = pixels(plot.tokens(photo, torch.tensor([1, 5]), GRID))
    expected = np.full((4, 6, 3), pictures.DIMMED * 0.4)
    expected[:2, 2:4] = expected[2:, 4:] = (0.8, 0.4, 0.0)
    assert shown == pytest.approx(expected, abs=1e-6)


def test_a_panel_for_each_cut() -> None:
    photo = np.zeros((4, 6, 3), np.uint8)
    figure = plot.tokens(photo, [torch.arange(5), torch.arange(3)], GRID)
    assert [axes.get_title() for axes in figure.axes] == ["5 of 6 tokens", "3 of 6 tokens"]
    assert figure.get_figwidth() * figure.dpi == 600


def test_any_kind_of_picture() -> None:
    photo = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    expected = photo / 255
    kinds = (photo, Image.fromarray(photo), torch.from_numpy(photo / 255).permute(2, 0, 1))
    for image in kinds:
        assert pictures.as_picture(image) == pytest.approx(expected, abs=1e-6)


def test_patches_that_do_not_divide_the_picture() -> None:
    photo = np.ones((5, 7, 3), np.float32)
    shown = pixels(plot.tokens(photo, torch.tensor([0]), GRID))
    assert shown[:3, :3] == pytest.approx(1.0)
    assert shown[3:, 3:] == pytest.approx(pictures.DIMMED)


def test_merged_patches_share_a_colour() -> None:
    photo = np.zeros((4, 6, 3), np.float32)
    photo[:2, :2], photo[2:, 4:] = 1.0, 0.5
    owner = torch.tensor([0, 1, 2, 3, 4, 0])
    figure = plot.merge_map(photo, owner, GRID)
    shown = pixels(figure)
    mean = np.float32((1.0 + 0.5) / 2)
    assert shown[0, 0] == pytest.approx(pictures.FLAT * mean + (1 - pictures.FLAT))
    assert shown[3, 5] == pytest.approx(pictures.FLAT * mean + (1 - pictures.FLAT) * 0.5)
    assert shown[0, 3] == pytest.approx(0)
    assert figure.axes[0].get_title() == "6 tokens merged into 5"
    dots = figure.axes[0].collections[-1].get_offsets()
    assert np.asarray(dots).tolist() == [[1.0, 1.0]]


def test_updated_share_is_that_of_the_patch_tokens() -> None:
    first = torch.tensor([[True, False, True, False, False, True, False]])
    second = torch.tensor([[True, False, False, False, False, True, False]])
    decoder = torch.ones(1, 24, dtype=torch.bool)
    share = plot.updated_share([first, second, decoder], GRID)
    assert share.tolist() == [[0, 0.5, 0], [0, 1, 0]]
    assert plot.updated_share([], GRID).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_reused_patches_are_grey_and_dim() -> None:
    picture = np.full((4, 6, 3), (200, 100, 0), np.uint8)
    drawn = 255 * plot.updated(picture, torch.tensor([[0, 1.0, 0.5], [0, 0, 0]]))
    assert drawn.shape == picture.shape
    quiet = 100 * pictures.DIMMED
    assert drawn[:2, :2] == pytest.approx(np.full((2, 2, 3), quiet), abs=0.1)
    tinted = (1 - pictures.STRENGTH) * picture[0, 0] + 255 * pictures.STRENGTH * np.array(
        pictures.TINT
    )
    assert drawn[0, 2] == pytest.approx(tinted, abs=0.1)
    assert drawn[1, 5] == pytest.approx((quiet + tinted) / 2, abs=0.1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: plot.tokens(BLACK[..., 0], torch.tensor([0]), GRID),
            r"image of shape \(4, 6\)",
        ),
        (lambda: plot.tokens(BLACK, torch.tensor([6]), GRID), "positions up to 6"),
        (lambda: plot.merge_map(BLACK, torch.arange(5), GRID), "owner of 5 patches"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        call()
