"""What the user asks for: one frozen dataclass for each method, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from tokenpass.errors import OptionError

Budget = int | float
"""A share of the patch tokens (float in (0, 1]) or their number (int, at least 1)."""

Stages = tuple[tuple[int, Budget], ...]

OBJECT_DEPTH = 9 / 24
"""Relative depth of the object layer: layer 9 of 24 in CLIP ViT-L/14 (HiPrune, section 4.1)."""

DEEP_DEPTH = 18 / 24
"""Relative depth of the last cut inside the encoder, chosen by measurement (docs/study.md)."""

CUTS = 4
"""Cuts between the object layer and the deep layer, chosen by measurement (docs/study.md)."""

DEFAULT_KEEP = 0.36
"""The cheapest share that cost no more than half a point of accuracy (docs/study.md)."""

DEFAULT_UPDATE = 0.25
"""Share of the tokens that a gate lets through, at which real video was measured (README)."""

SCENE_CUT = 0.3
"""Share of changed cells from which on a frame is computed in full (docs/study.md)."""

MAX_STREAMS = 8
"""Streams whose state is kept unless more are asked for."""


def check_budget(name: str, value: Any) -> None:
    """Raise :class:`OptionError` unless ``value`` is a share or a number of tokens."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{name}={value!r}: expected a float in (0, 1] or an int of at least 1")
    if isinstance(value, int) and value < 1:
        raise OptionError(f"{name}={value}: an int is a number of tokens, at least 1")
    if isinstance(value, float) and not 0.0 < value <= 1.0:
        raise OptionError(f"{name}={value}: a float is a share of the patch tokens, in (0, 1]")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice or value == choice for choice in choices):
        allowed = ", ".join(repr(choice) for choice in choices)
        raise OptionError(f"{name}={value!r}: choose one of {allowed}")


@dataclass(frozen=True)
class HiPrune:
    """Hierarchical pruning after HiPrune (arXiv 2508.00553): no training.

    Kept are *anchors*, the ``round(K * alpha / 5)`` tokens that receive most attention in the
    object layer; *buffers*, their four neighbours on the grid; and *registers*, the tokens that
    receive most attention in a deep layer, up to exactly ``K`` of ``N`` patch tokens.

    Attributes:
        keep: ``K`` as a share of the patch tokens (float in (0, 1]) or as their number (int >= 1).
        alpha: Share of the budget for anchors and buffers, in [0, 1].
        object_layer: The block, counted from 1, whose attention finds the anchors. Default
            ``round(depth * 9 / 24)``.
        deep_layer: The block of the last cut. Default ``round(depth * 18 / 24)`` inside the
            encoder, the last block for ``where="output"``.
        stages: Schedule of the cuts inside the encoder as ``((layer, keep), ...)``, layers rising
            and budgets falling; the last one is the final budget and replaces ``keep``.
        where: ``"encoder"`` cuts inside, so that later blocks cost less; ``"output"`` runs the
            encoder in full and cuts its output (the form of the paper).
        dropped: ``"merge"`` adds a dropped token to the kept token most similar to it (default
            inside the encoder); ``"discard"`` lets it go (default for ``where="output"``).
        output: ``"restored"`` keeps the shapes of the model's outputs (default inside the encoder);
            ``"pruned"`` returns prefix and kept tokens only (default for ``where="output"``).
        compat: ``"llava"`` or ``"qwen"`` select as the published code does, quirks included.
        ranking: What a cut ranks tokens by: ``"received"`` attention; ``"class"``, the attention
            that the first prefix token pays; ``"random"``, a baseline.

    Raises:
        OptionError: If a value is not one of the above.
    """

    keep: Budget = DEFAULT_KEEP
    alpha: float = 0.1
    object_layer: int | None = None
    deep_layer: int | None = None
    stages: Stages | None = None
    where: Literal["encoder", "output"] = "encoder"
    dropped: Literal["merge", "discard"] | None = None
    output: Literal["restored", "pruned"] | None = None
    compat: Literal[False, "llava", "qwen"] = False
    ranking: Literal["received", "class", "random"] = "received"

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        check_choice("where", self.where, ("encoder", "output"))
        check_choice("dropped", self.dropped, ("merge", "discard", None))
        check_choice("output", self.output, ("restored", "pruned", None))
        check_choice("compat", self.compat, (False, "llava", "qwen"))
        check_choice("ranking", self.ranking, ("received", "class", "random"))
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise OptionError(f"alpha={self.alpha!r}: expected a float in [0, 1]")
        if not 0.0 <= self.alpha <= 1.0:
            raise OptionError(f"alpha={self.alpha}: expected a float in [0, 1]")
        for name in ("object_layer", "deep_layer"):
            self._check_layer(name, getattr(self, name))
        if self.stages is not None:
            object.__setattr__(self, "stages", self._checked_stages(self.stages))

    @staticmethod
    def _check_layer(name: str, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}={value!r}: expected a block counted from 1, or None")

    def _checked_stages(self, stages: Any) -> Stages:
        pairs = tuple(tuple(pair) for pair in stages)
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise OptionError(f"stages={stages!r}: expected pairs (layer, keep)")
        for layer, keep in pairs:
            self._check_layer("stages: layer", layer)
            check_budget("stages: keep", keep)
        layers = [layer for layer, _ in pairs]
        if layers != sorted(set(layers)):
            raise OptionError(f"stages={stages!r}: layers must rise from one cut to the next")
        if self.where == "output":
            raise OptionError('stages cut inside the encoder: they contradict where="output"')
        if self.keep not in (DEFAULT_KEEP, pairs[-1][1]):
            raise OptionError(
                f"keep={self.keep} contradicts stages={stages!r}, whose last cut is the budget: "
                "pass one of them"
            )
        object.__setattr__(self, "keep", pairs[-1][1])
        return pairs

    def check_applicable(self) -> None:
        """Raise :class:`OptionError` where the method can select but not rewrite a model."""
        if self.compat and self.where == "encoder":
            raise OptionError(
                f"compat={self.compat!r} reproduces code that cuts the encoder's output: "
                'pass where="output" with it'
            )
        if self.compat == "qwen":
            raise OptionError(
                'compat="qwen" keeps a number of tokens that depends on the image: it works in '
                'tokenpass.select, not in a compiled model; use compat=False or "llava"'
            )

    @property
    def merges(self) -> bool:
        """Whether dropped tokens are merged, the default resolved."""
        return (self.dropped or ("merge" if self.where == "encoder" else "discard")) == "merge"

    @property
    def restores(self) -> bool:
        """Whether outputs keep their shapes, the default resolved."""
        return (self.output or ("restored" if self.where == "encoder" else "pruned")) == "restored"

    @property
    def full(self) -> bool:
        """Whether the budget is all tokens, whatever their number."""
        budgets = [keep for _, keep in self.stages or ()] or [self.keep]
        return all(isinstance(keep, float) and keep == 1.0 for keep in budgets)

    def with_budget(self, keep: Budget) -> HiPrune:
        """The same with another final budget; a schedule of its own keeps its proportions.

        Raises:
            OptionError: If the schedule counts tokens, so that its proportions are not known.
        """
        if self.stages is None:
            return replace(self, keep=keep)
        shares = [share for _, share in self.stages]
        if not all(isinstance(share, float) for share in (keep, *shares)) or shares[-1] == 1.0:
            raise OptionError(
                f"keep={keep!r} cannot be derived from stages={self.stages!r}: "
                "compile with other stages"
            )
        power = math.log(keep) / math.log(shares[-1])
        stages = tuple((layer, share**power) for layer, share in self.stages)
        return replace(self, keep=stages[-1][1], stages=stages)


@dataclass(frozen=True)
class Eventful:
    """Eventful gating of video after Eventful Transformers (arXiv 2308.13494): no training.

    Every token-wise region of the model (norm to queries, keys and values; output projection; MLP)
    remembers for each token what it last used and computed. In a frame it is run on the tokens that
    have changed most since; the others keep what was computed for them. Prefix tokens (class,
    registers) are always updated, and the first frame of a stream is computed in full.

    Attributes:
        keep: Share of the patch tokens that each gate lets through in a frame (float in (0, 1]), or
            their number (int >= 1). ``None`` with a threshold: no limit.
        threshold: Let through what changed by more than this norm, at most ``keep`` if both are
            given.
        attention: ``"none"``: attention itself stays as it was traced; ``"scores"``: scores are
            buffered and updated (section 4.2), ``O(N^2)`` memory, equal to ``"none"`` in value;
            ``"delta"``: their product with the values as well, by deltas (section 4.3), the
            published form; ``"exact"``: softmax attention on the buffered queries, keys and
            values, updated with ``O(N)`` memory for what changed.
        norm: Norm of a change over channels: 1, 2 or ``inf``.
        gate_before_norm: Whether changes are measured before the normalisation of a region.
        compat: As the published code does it: prefix tokens compete like any other and are counted
            in ``keep``, of which fractions are rounded down; no frame is taken for a cut.
        ranking: ``"change"``, or ``"random"`` as a baseline.
        scene_cut: Share of the input's cells that must change at once for a frame to be computed in
            full; ``None`` never does it.
        max_streams: Streams whose state is kept; the least recently used one goes.

    Raises:
        OptionError: If a value is not one of the above.
    """

    keep: Budget | None = None
    threshold: float | None = None
    attention: Literal["exact", "delta", "scores", "none"] = "exact"
    norm: float = 2
    gate_before_norm: bool = False
    compat: bool = False
    ranking: Literal["change", "random"] = "change"
    scene_cut: float | None = SCENE_CUT
    max_streams: int = MAX_STREAMS

    def __post_init__(self) -> None:
        if self.keep is None and self.threshold is None:
            object.__setattr__(self, "keep", DEFAULT_UPDATE)
        if self.keep is not None:
            check_budget("keep", self.keep)
        check_threshold(self.threshold)
        check_choice("attention", self.attention, ("exact", "delta", "scores", "none"))
        check_choice("norm", self.norm, (1, 2, math.inf))
        check_choice("ranking", self.ranking, ("change", "random"))
        for name in ("gate_before_norm", "compat"):
            check_choice(name, getattr(self, name), (True, False))
        if self.scene_cut is not None and not (_is_number(self.scene_cut) and self.scene_cut > 0):
            raise OptionError(f"scene_cut={self.scene_cut!r}: expected a share in (0, 1], or None")
        if isinstance(self.max_streams, bool) or not isinstance(self.max_streams, int):
            raise OptionError(f"max_streams={self.max_streams!r}: expected an int of at least 1")
        if self.max_streams < 1:
            raise OptionError(f"max_streams={self.max_streams}: expected an int of at least 1")

    @property
    def cut_share(self) -> float | None:
        """``scene_cut``, which the published code does not have."""
        return None if self.compat else self.scene_cut

    def check_applicable(self) -> None:
        """Nothing that only a model could tell."""

    @property
    def full(self) -> bool:
        """Whether every token is let through, whatever their number."""
        everything = isinstance(self.keep, float) and self.keep == 1.0
        return self.threshold is None and everything


Method = HiPrune | Eventful


def check_threshold(value: Any) -> None:
    """Raise :class:`OptionError` unless ``value`` is a norm, or ``None``."""
    if value is not None and not (_is_number(value) and 0 <= value < math.inf):
        raise OptionError(f"threshold={value!r}: expected a number of at least 0, or None")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def layer_at(depth: int, share: float) -> int:
    """The block, counted from 1, at a relative depth."""
    return min(depth, max(1, round(depth * share)))


def cut_layers(first: int, last: int) -> list[int]:
    """At most :data:`CUTS` blocks from ``first`` to ``last``, evenly spaced, both included."""
    count = min(CUTS, last - first + 1)
    if count <= 1:
        return [last]
    step = (last - first) / (count - 1)
    return [first + math.floor(step * index) for index in range(count)]
