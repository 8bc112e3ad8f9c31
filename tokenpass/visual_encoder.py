"""Running a model's own path from pixels to visual tokens, with the scores of each token.

The path runs as it is, fused attention included. The first call also finds how many attention
layers it has and which is the last that its features depend on; the first call for other shapes
finds what each visual token is made of (:mod:`tokenpass.visual_cells`) and what need not run
(:mod:`tokenpass.visual_path`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenpass.errors import OptionError, TokenpassError
from tokenpass.methods import OBJECT_DEPTH, HiPrune, layer_at
from tokenpass.vision_attention import AttentionWatch, Layer, sequence_lengths
from tokenpass.visual_cells import Cells, NotReachedError, find_cells
from tokenpass.visual_grid import Raster, rasters
from tokenpass.visual_inputs import Key, key_of, recorded, recording, sizes_of
from tokenpass.visual_output import counts_of, fields_of, images_of
from tokenpass.visual_path import (
    NO_DATA,
    Shortcuts,
    TakenAnotherWayError,
    find_shortcuts,
    mapped,
    only_with_data,
    shortened,
    tensors_in,
)
from tokenpass.visual_tokens import VisualTokens


@dataclass(frozen=True)
class Structure:
    """What is known of the path for inputs of some shapes.

    Attributes:
        cells: What each visual token is made of.
        counts: Visual tokens of each image.
        pruned: For each image those that are made of encoder tokens, ``(M,)``.
        places: For each image the raster of these.
        shortcuts: What need not run.
    """

    cells: Cells
    counts: tuple[int, ...]
    pruned: tuple[Tensor, ...]
    places: tuple[Raster | None, ...]
    shortcuts: Shortcuts

    @property
    def starts(self) -> list[int]:
        """The number of visual tokens before each image."""
        return [sum(self.counts[:number]) for number in range(len(self.counts))]


@dataclass(frozen=True)
class Scored:
    """The visual tokens of one image.

    Attributes:
        count: All of them.
        pruned: Those that may leave, ``(M,)``; others (line ends) stay.
        tokens: These, with their scores.
    """

    count: int
    pruned: Tensor
    tokens: VisualTokens


Pick = Callable[[Sequence[Scored]], list[Tensor]]
"""Chooses without looking at features: for each image the places in ``tokens`` that stay."""


@dataclass(frozen=True)
class Encoded:
    """The visual tokens of one call.

    Attributes:
        output: What the path returned.
        features: For each image ``(count, D)``; of tokens that were not picked maybe not a number.
        images: What is known of them.
        picked: What stays, if that was asked for.
    """

    output: Any
    features: list[Tensor]
    images: list[Scored]
    picked: list[Tensor] | None = None


class VisualEncoder:
    """The path from pixels to visual tokens of one modality.

    Args:
        root: The module that has the path as a method.
        path: Name of the method; returns an object with ``pooler_output``.
        patch: Pixels of a patch ``(H, W)``, or ``None`` if they are not known.
    """

    def __init__(self, root: nn.Module, path: str, patch: tuple[int, int] | None) -> None:
        self._root = root
        self._path = path
        self._patch = patch
        self._depth = 0
        self._deep = 0
        self._known: dict[Key, Structure] = {}
        self._alone: dict[nn.Module, bool] = {}

    def __call__(
        self, method: HiPrune, inputs: Mapping[str, Any], pick: Pick | None = None
    ) -> Encoded:
        """Encode, and score each visual token.

        Args:
            method: Names the layers that are scored.
            inputs: Of the path.
            pick: Chooses among the tokens; where it can, before they are computed.

        Raises:
            OptionError: If the method asks for a layer that the encoder does not have, or that its
                features do not depend on.
            TokenpassError: If no attention ranks the visual tokens.
        """
        if not self._depth:
            self._measure(method, inputs)
        known = self._known.get(key_of(inputs))
        if known is None:
            return self._explore(method, inputs, pick)
        if not known.shortcuts:
            return self._in_full(method, inputs, pick, known)
        try:
            return self._shortened(method, inputs, pick, known)
        except TokenpassError:
            raise
        except Exception:  # whatever a model does with what is not there: it runs in full instead
            self._known[key_of(inputs)] = known = replace(known, shortcuts=Shortcuts())
            return self._in_full(method, inputs, pick, known)

    def forget(self) -> None:
        """Explore the path anew in the next call."""
        self._depth = self._deep = 0
        self._known.clear()
        self._alone.clear()

    def _run(self, root: nn.Module, inputs: Mapping[str, Any]) -> Any:
        return getattr(root, self._path)(**inputs, return_dict=True)

    def _measure(self, method: HiPrune, inputs: Mapping[str, Any]) -> None:
        """Find the number of layers, and the last that the features depend on."""
        with torch.no_grad(), AttentionWatch() as watch:
            self._run(self._root, inputs)
        depth = len(watch.layers)
        for layer in range(depth, 0, -1):
            with contextlib.suppress(NotReachedError):
                self._depth, self._deep = depth, layer
                self._explore(method, inputs, None)
                return
        self._depth = 0
        raise TokenpassError(
            "no attention was seen that the visual tokens depend on: the encoder must compute "
            'attention with torch operations (for instance attn_implementation="sdpa")'
        )

    def _layers(self, method: HiPrune) -> tuple[int, int]:
        """Numbers of the object layer and of the deep layer."""
        deep = method.deep_layer or self._deep
        first = method.object_layer or min(layer_at(self._depth, OBJECT_DEPTH), deep)
        for name, layer in (("object_layer", first), ("deep_layer", deep)):
            if layer > self._deep:
                raise OptionError(
                    f"{name}={layer}: the visual tokens depend on the first {self._deep} of "
                    f"{self._depth} attention layers only"
                )
        return first, deep

    # ------------------------------------------------------------ runs

    def _explore(self, method: HiPrune, inputs: Mapping[str, Any], pick: Pick | None) -> Encoded:
        """The first run for inputs of some shapes, under autograd."""
        watch = AttentionWatch(self._layers(method), self._deep)
        with recording(), watch:
            output = self._run(self._root, recorded(inputs))
            features = images_of(output)
        known = self._structure(output, features, watch, inputs)
        self._known[key_of(inputs)] = known
        starts = watch.sorted_layers[self._deep - 1].outputs
        if not torch.is_grad_enabled() or all(start.is_leaf for start in starts):
            output = mapped(output, lambda x: x.detach())
        return self._encoded(output, self._scored(method, watch, known), pick)

    def _in_full(
        self, method: HiPrune, inputs: Mapping[str, Any], pick: Pick | None, known: Structure
    ) -> Encoded:
        with AttentionWatch(self._layers(method)) as watch:
            output = self._run(self._root, inputs)
        if not self._went_as(known, watch) or known.counts != counts_of(output):
            return self._explore(method, inputs, pick)
        return self._encoded(output, self._scored(method, watch, known), pick)

    def _shortened(
        self, method: HiPrune, inputs: Mapping[str, Any], pick: Pick | None, known: Structure
    ) -> Encoded:
        """A run in which only what the tokens that stay need is computed.

        Raises:
            TakenAnotherWayError: If something else was needed, or the path is not the known one.
        """
        watch = AttentionWatch(self._layers(method))
        picked: list[list[Tensor]] = []

        def staying() -> Tensor:
            if not picked:
                if not self._went_as(known, watch):
                    raise TakenAnotherWayError
                assert pick is not None, "without a choice no module is row-wise"
                picked.append(pick(self._scored(method, watch, known)))
            return _staying(known, picked[0])

        shortcuts = known.shortcuts
        if pick is None or torch.is_grad_enabled():  # a gradient of 0 times what is no number
            shortcuts = replace(shortcuts, rows={})
        with watch:
            output = self._run(shortened(self._root, shortcuts, staying), inputs)
        if any(
            x.device == NO_DATA for x in tensors_in([output["pooler_output"], fields_of(output)])
        ):
            raise TakenAnotherWayError
        output = only_with_data(output)
        if not self._went_as(known, watch) or known.counts != counts_of(output):
            raise TakenAnotherWayError
        images = self._scored(method, watch, known)
        if not picked:
            return self._encoded(output, images, pick)
        encoded = self._encoded(output, images, None)
        stays = _staying(known, picked[0])
        used = [torch.cat(encoded.features), *tensors_in(fields_of(output))]
        if any(x[stays].isnan().any() for x in used if len(x) == len(stays)):
            raise TakenAnotherWayError
        return replace(encoded, picked=picked[0])

    def _went_as(self, known: Structure, watch: AttentionWatch) -> bool:
        """Whether attention ran on the tokens that are known."""
        layers = watch.sorted_layers
        return len(layers) >= self._deep and layers[self._deep - 1].layout == known.cells.layout

    @staticmethod
    def _encoded(output: Any, images: list[Scored], pick: Pick | None) -> Encoded:
        features = images_of(output)
        made = [
            replace(one, tokens=replace(one.tokens, features=rows[one.pruned]))
            for one, rows in zip(images, features, strict=True)
        ]
        return Encoded(output, features, made, None if pick is None else pick(made))

    # ------------------------------------------------------------ what is known

    def _structure(
        self,
        output: Any,
        features: Sequence[Tensor],
        watch: AttentionWatch,
        inputs: Mapping[str, Any],
    ) -> Structure:
        layers = watch.sorted_layers[: self._deep]
        with torch.inference_mode(False), torch.enable_grad():
            rows = torch.cat(list(features))
            cells = find_cells(rows, layers[-1].outputs)
            if any(layer.crossed for layer in layers):
                raise TokenpassError(
                    "visual tokens come out of a resampler, whose queries are no image tokens: no "
                    "attention among image tokens ranks them"
                )
            further = [x for x in tensors_in(fields_of(output)) if x.requires_grad]
            shortcuts = find_shortcuts(self._root, watch.calls, rows, further, self._alone)
        made = torch.split(cells.sizes > 0, [len(x) for x in features])
        pruned = tuple(one.nonzero().squeeze(1) for one in made)
        known = Structure(cells, tuple(map(len, features)), pruned, (), shortcuts)
        flat = [mine + start for mine, start in zip(pruned, known.starts, strict=True)]
        return replace(known, places=tuple(rasters(cells, flat, sizes_of(inputs, self._patch))))

    def _scored(self, method: HiPrune, watch: AttentionWatch, known: Structure) -> list[Scored]:
        """The visual tokens of each image, without their features."""
        first, deep = self._layers(method)
        layers = watch.sorted_layers
        scores = [self._scores(layers[n - 1], n, known, method) for n in (first, deep)]
        last, class_scores = layers[deep - 1], None
        if self._has_class_token(known):
            class_scores = known.cells.mean(torch.cat(last.from_first))
        keys = known.cells.mean(torch.cat(last.keys)) if last.keys else None
        images = []
        for count, mine, start, raster in zip(
            known.counts, known.pruned, known.starts, known.places, strict=True
        ):
            flat = mine + start
            tokens = VisualTokens(
                features=scores[0].new_empty(len(flat), 0),
                object_scores=scores[0][flat],
                deep_scores=scores[1][flat],
                class_scores=None if class_scores is None else class_scores[flat],
                keys=None if keys is None else keys[flat],
                raster=raster,
            )
            images.append(Scored(count, mine, tokens))
        return images

    def _scores(self, layer: Layer, number: int, known: Structure, method: HiPrune) -> Tensor:
        """Attention received by each visual token, ``(count,)``, float32."""
        same = layer.layout == known.cells.layout
        packed = all(rows == 1 for rows, _ in (*layer.layout, *known.cells.layout))
        received = torch.cat(layer.received) if layer.received else torch.empty(0)
        tokens = sum(rows * length for rows, length in known.cells.layout)
        if layer.crossed or len(received) != tokens or not (same or packed):
            raise TokenpassError(
                f"attention layer {number} works on other tokens {layer.layout} than the last "
                f"one, {known.cells.layout}: choose object_layer and deep_layer among its like"
            )
        if method.compat == "qwen":  # the published code sums over queries
            lengths = torch.tensor(sequence_lengths(layer.layout), device=received.device)
            received = received * lengths.repeat_interleave(lengths)
        return known.cells.mean(received)

    @staticmethod
    def _has_class_token(known: Structure) -> bool:
        """Whether the first token of each sequence goes into no visual token."""
        lengths = sequence_lengths(known.cells.layout)
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].to(known.cells.tokens.device)
        return not bool(torch.isin(starts, known.cells.tokens).any())


def _staying(known: Structure, picked: Sequence[Tensor]) -> Tensor:
    """For each visual token of all images whether it stays, bool."""
    leaves = torch.zeros(sum(known.counts), dtype=torch.bool, device=known.cells.tokens.device)
    for mine, start, stays in zip(known.pruned, known.starts, picked, strict=True):
        leaves[mine + start] = True
        leaves[mine[stays] + start] = False
    return ~leaves
