"""What the video demo draws: frames with the tokens that were updated, beside a saliency map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.stream import VideoStream
from matplotlib import colormaps
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]

CODECS = ("libx264", "mpeg4")
"""The first one that FFmpeg was built with is used."""
QUIET = 0.4
"""How bright a patch is, and without colour, whose token no gate let through."""
TINT = (255, 150, 30)
STRENGTH = 0.3
"""How much of the tint a patch takes on whose token passed every gate."""


def updated_share(selected: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """Share of the gates that let each patch token through, ``(rows, columns)``.

    Args:
        selected: Gate by gate ``(1, N)``, bool; patch tokens are the last ones. Gates over another
            set of tokens than the first one's (a decoder's) are left out. No gates at all mean
            that everything was computed.
        grid: Rows and columns of patches.
    """
    patches = grid[0] * grid[1]
    if not selected:
        return torch.ones(grid)
    tokens = selected[0].shape[1]
    masks = [mask[0, -patches:].float() for mask in selected if mask.shape[1] == tokens]
    return torch.stack(masks).mean(0).reshape(grid).cpu()


def overlay(picture: Pixels, share: Tensor) -> Pixels:
    """A frame ``(H, W, 3)``, grey where tokens were reused and tinted where they were updated."""
    rows, columns = picture.shape[0] // share.shape[0], picture.shape[1] // share.shape[1]
    spread = share.repeat_interleave(rows, 0).repeat_interleave(columns, 1).numpy()[..., None]
    colours = picture.astype(np.float32)
    quiet = QUIET * colours.mean(-1, keepdims=True)
    tinted = colours + STRENGTH * (np.array(TINT, np.float32) - colours)
    return _to_pixels(quiet + spread * (tinted - quiet))


def heat(values: Tensor) -> Pixels:
    """A map ``(H, W)``, 0 to 1, in colours: ``(H, W, 3)``."""
    return _to_pixels(255 * colormaps["magma"](values.numpy())[..., :3])


def _to_pixels(values: NDArray[np.floating]) -> Pixels:
    pixels: Pixels = values.round().clip(0, 255).astype(np.uint8)
    return pixels


class Writer:
    """An MP4 file that is being written."""

    def __init__(self, container: av.container.OutputContainer, rate: float) -> None:
        self.container, self.rate = container, Fraction(rate).limit_denominator(1000)
        self.stream: VideoStream | None = None

    def write(self, picture: Pixels) -> None:
        """Add a frame ``(H, W, 3)`` with even sides; all frames are of one size."""
        if self.stream is None:
            self.stream = self._open(*picture.shape[:2])
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        self.container.mux(self.stream.encode(frame))

    def _open(self, height: int, width: int) -> VideoStream:
        codec = next(name for name in CODECS if name in av.codecs_available)
        stream = self.container.add_stream(codec, rate=self.rate)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        return stream

    def finish(self) -> None:
        if self.stream is not None:
            self.container.mux(self.stream.encode(None))


@contextmanager
def writing(path: Path, rate: float) -> Iterator[Writer]:
    """An MP4 file of so many frames a second, complete when the block ends."""
    with av.open(str(path), "w") as container:
        writer = Writer(container, rate)
        yield writer
        writer.finish()
