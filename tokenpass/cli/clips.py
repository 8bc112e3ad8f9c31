"""Video, frame by frame: read from files and cameras, written as MP4."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

from tokenpass.cli.pictures import Pixels
from tokenpass.cli.screen import InputError
from tokenpass.errors import described

CODECS = ("libx264", "mpeg4")
"""The first one that FFmpeg was built with is used."""
BIT_RATE = 4_000_000
RATE = 25.0
"""Frames in a second where a source does not say."""

CAMERAS = {
    "Linux": ("/dev/video{}", "v4l2"),
    "Darwin": ("{}", "avfoundation"),
    "Windows": ("video={}", "dshow"),
}
"""How FFmpeg names a camera on each system, and the format that reads it."""


@contextmanager
def opened(source: str) -> Iterator[av.container.InputContainer]:
    """A file, or the camera of that number.

    Raises:
        InputError: If it cannot be opened, or has no pictures.
    """
    name = source
    form: str | None = None
    if source.isdigit():
        pattern, form = CAMERAS.get(platform.system(), CAMERAS["Linux"])
        name = pattern.format(source)
    elif not Path(source).is_file():
        raise InputError(f"there is no file {source}")
    try:
        container = av.open(name, format=form)
    except Exception as error:
        kind = f"camera {source} cannot be opened" if form else f"{source} is no video"
        raise InputError(f"{kind} ({described(error)})") from error
    with container:
        if not container.streams.video:
            raise InputError(f"{source} has no pictures")
        yield container


def pictures(
    path: Path | str, limit: int | None = None, start: int = 0, size: tuple[int, int] | None = None
) -> Iterator[Pixels]:
    """Successive frames ``(H, W, 3)``, 0 to 255, resized without regard to their proportions.

    Args:
        path: Of a file that FFmpeg can read, or the number of a camera.
        limit: How many frames; default all.
        start: The first one.
        size: ``(H, W)``; default: as they are.

    Raises:
        InputError: If there is no such file, or it is no video.
    """
    height, width = size or (None, None)
    with opened(str(path)) as container:
        end = None if limit is None else start + limit
        for frame in islice(container.decode(video=0), start, end):
            yield frame.to_ndarray(
                format="rgb24", height=height, width=width, interpolation="BICUBIC"
            ).astype(np.uint8, copy=False)


def frame_rate(path: Path | str) -> float:
    """Frames in a second, as the source says."""
    with opened(str(path)) as container:
        return float(container.streams.video[0].average_rate or RATE)


def frame_count(path: str) -> int | None:
    """How many frames a file says that it has; ``None`` if it does not say."""
    with opened(path) as container:
        return container.streams.video[0].frames or None


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
        stream.bit_rate = BIT_RATE
        return stream

    def finish(self) -> None:
        if self.stream is not None:
            self.container.mux(self.stream.encode(None))


@contextmanager
def writing(path: Path, rate: float) -> Iterator[Writer]:
    """An MP4 file of so many frames a second, complete when the block ends."""
    with av.open(str(path), "w", format="mp4") as container:
        writer = Writer(container, rate)
        yield writer
        writer.finish()
