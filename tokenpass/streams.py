"""Videos of which a gated graph remembers what it computed, and what it did in a frame."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenpass.gated import Gated
from tokenpass.scenes import SceneWatch
from tokenpass.sessions import Session

Signature = tuple[Any, ...]

NOTHING_LEFT = "the frame before left nothing to go on from"


@dataclass(frozen=True)
class Frame:
    """What happened in one frame.

    Attributes:
        gated: The graph that ran.
        full: Whether everything was computed.
        passed: For each gate what it let through, positions ``(B, U)`` or a mask ``(B, N)``; empty
            for a full frame.
        why: Why everything was computed, if it was.
    """

    gated: Gated
    full: bool
    passed: Sequence[Tensor] = ()
    why: str = ""

    @cached_property
    def selected(self) -> list[Tensor]:
        """For each gate the tokens that passed, ``(B, N)``, bool."""
        plan = self.gated.plan
        if plan is None:
            return []
        masks: list[Tensor] = []
        for number, region in enumerate(plan.regions):
            mask = torch.full((region.layout.images, region.layout.count), self.full)
            if not self.full:
                passed = self.passed[number].cpu()
                mask = passed if passed.dtype == torch.bool else mask.scatter(1, passed, True)
            masks.append(mask)
        return masks

    @property
    def update_rates(self) -> list[float]:
        """Share of the tokens that passed each gate."""
        return [float(mask.float().mean()) for mask in self.selected]

    @property
    def rows(self) -> list[int]:
        """Rows that passed each gate."""
        return [int(mask.sum()) for mask in self.selected]

    @property
    def flops(self) -> int:
        """Floating-point operations of the frame."""
        if self.full:
            whole = self.gated.flops_full
            return self.gated.report.flops if whole is None else whole
        return self.gated.operations.flops(self.rows)

    @property
    def operations(self) -> dict[str, int]:
        """Multiply-adds in the categories of the published code's counters."""
        return self.gated.operations.counted(self.selected, full=self.full)


@dataclass
class Stream:
    """The state of one video.

    Attributes:
        signature: Shapes, dtypes and devices of its frames.
        state: The tensors that the graphs write into.
        fresh: Why the next frame has to be computed in full; empty if it need not.
        finite: Whether all changes of the last frame were finite, ``()``, bool.
        scenes: Tells a cut from motion.
        frame: The last one.
    """

    signature: Signature = ()
    state: list[Tensor] = field(default_factory=list)
    fresh: str = "first frame"
    finite: Tensor | None = None
    scenes: SceneWatch = field(default_factory=SceneWatch)
    frame: Frame | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class StreamSession(Session):
    """The streams of one model, the most recently used one last.

    Attributes:
        threshold: A threshold set at run time; ``None`` for the one it was compiled with.
    """

    threshold: float | None = None
    streams: OrderedDict[str, Stream] = field(default_factory=OrderedDict)
    last: Stream | None = None

    @property
    def state_bytes(self) -> int:
        """Memory of all streams."""
        tensors = (x for stream in self.streams.values() for x in stream.state)
        return sum(x.numel() * x.element_size() for x in tensors)

    def export(self, name: str) -> dict[str, Any]:
        """The state of a stream, as copies that can be moved to another process."""
        stream = self.streams[name]
        with stream.lock:
            return {
                "signature": stream.signature,
                "state": [x.detach().clone() for x in stream.state],
                "fresh": stream.fresh,
            }

    def restore(self, name: str, saved: Mapping[str, Any]) -> None:
        """Continue a stream from what :meth:`export` gave."""
        stream = self.streams.setdefault(name, Stream())
        with stream.lock:
            stream.signature, stream.fresh = saved["signature"], saved["fresh"]
            with torch.inference_mode(False):
                stream.state = [x.detach().clone() for x in saved["state"]]
            stream.finite, stream.scenes = None, SceneWatch()

    def follow(self, other: Session) -> None:
        super().follow(other)
        if isinstance(other, StreamSession):
            self.threshold = other.threshold

    def forget(self) -> None:
        super().forget()
        self.threshold = None
        self.streams.clear()
