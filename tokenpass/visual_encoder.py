"""Running a model's own path from pixels to visual tokens, with the scores of each token.

The path runs as it is, fused attention included. The first call also finds how many attention
layers it has and which is the last that its features depend on; the first call for other shapes
finds what each visual token is made of (:mod:`tokenpass.visual_cells`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenpass.errors import OptionError, TokenpassError
from tokenpass.methods import OBJECT_DEPTH, HiPrune, layer_at
from tokenpass.vision_attention import AttentionWatch, Layer, sequence_lengths
from tokenpass.visual_cells import Cells, NotReachedError, find_cells
from tokenpass.visual_grid import Raster, Sizes, rasters
from tokenpass.visual_tokens import VisualTokens

MAX_TABLE = 4096
"""Elements up to which an integer input is a table whose values decide on shapes."""

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Structure:
    """What is known of the path for inputs of some shapes.

    Attributes:
        cells: What each visual token is made of.
        counts: Visual tokens of each image.
        places: For each image its raster, of the tokens that are made of encoder tokens.
    """

    cells: Cells
    counts: tuple[int, ...]
    places: tuple[Raster | None, ...]


@dataclass(frozen=True)
class Encoded:
    """The visual tokens of one call.

    Attributes:
        output: What the path returned.
        features: For each image ``(M, D)``.
        pruned: For each image the tokens that may leave, ``(M',)``; others (line ends) stay.
        tokens: For each image those tokens with their scores.
    """

    output: Any
    features: list[Tensor]
    pruned: list[Tensor]
    tokens: list[VisualTokens]


class VisualEncoder:
    """The path from pixels to visual tokens of one modality.

    Args:
        run: The model's own path; returns an object with ``pooler_output``.
        patch: Pixels of a patch ``(H, W)``, or ``None`` if they are not known.
    """

    def __init__(self, run: Callable[..., Any], patch: tuple[int, int] | None) -> None:
        self._run = run
        self._patch = patch
        self._depth = 0
        self._deep = 0
        self._known: dict[Key, Structure] = {}

    def __call__(self, method: HiPrune, inputs: Mapping[str, Any]) -> Encoded:
        """Encode, and score each visual token.

        Raises:
            OptionError: If the method asks for a layer that the encoder does not have, or that its
                features do not depend on.
            TokenpassError: If no attention ranks the visual tokens.
        """
        if not self._depth:
            self._measure(method, inputs)
        return self._encode(method, inputs)

    def _measure(self, method: HiPrune, inputs: Mapping[str, Any]) -> None:
        """Find the number of layers, and the last that the features depend on."""
        with torch.no_grad(), AttentionWatch() as watch:
            self._run(**inputs)
        depth = len(watch.layers)
        for layer in range(depth, 0, -1):
            with contextlib.suppress(NotReachedError):
                self._depth, self._deep = depth, layer
                self._encode(method, inputs)
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

    def _encode(self, method: HiPrune, inputs: Mapping[str, Any]) -> Encoded:
        first, deep = self._layers(method)
        key = _key(inputs)
        known = self._known.get(key)
        watch = AttentionWatch((first, deep), None if known else self._deep)
        with _recording(not known), watch:
            output = self._run(**(inputs if known else _recorded(inputs)))
            features = images_of(output)
        layers = list(watch.layers.values())
        last = layers[self._deep - 1]
        if known is None:
            known = self._structure(features, layers[: self._deep], inputs)
            self._known[key] = known
            if not torch.is_grad_enabled() or all(start.is_leaf for start in last.outputs):
                output, features = detached(output), [x.detach() for x in features]
        if last.layout != known.cells.layout or known.counts != tuple(map(len, features)):
            del self._known[key]
            return self._encode(method, inputs)
        scores = [self._scores(layers[n - 1], n, known, method) for n in (first, deep)]
        return self._gathered(output, features, known, scores, layers[deep - 1])

    def _structure(
        self, features: Sequence[Tensor], layers: Sequence[Layer], inputs: Mapping[str, Any]
    ) -> Structure:
        with torch.inference_mode(False), torch.enable_grad():
            cells = find_cells(torch.cat(list(features)), layers[-1].outputs)
        if any(layer.crossed for layer in layers):
            raise TokenpassError(
                "visual tokens come out of a resampler, whose queries are no image tokens: no "
                "attention among image tokens ranks them"
            )
        counts = tuple(map(len, features))
        chosen, start = [], 0
        for count in counts:
            made = cells.sizes[start : start + count] > 0
            chosen.append(made.nonzero().squeeze(1) + start)
            start += count
        return Structure(cells, counts, tuple(rasters(cells, chosen, self._sizes(inputs))))

    def _sizes(self, inputs: Mapping[str, Any]) -> Sizes:
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        pictures = [tuple(x.shape[-2:]) for x in tensors if x.is_floating_point() and x.dim() >= 4]
        tables = [x for x in tensors if _is_table(x) and x.dim() == 2 and x.shape[1] in (2, 3)]
        return Sizes(tuple((int(h), int(w)) for h, w in pictures), tuple(tables), self._patch)

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

    def _gathered(
        self,
        output: Any,
        features: list[Tensor],
        known: Structure,
        scores: Sequence[Tensor],
        deep: Layer,
    ) -> Encoded:
        class_scores = None
        if self._has_class_token(known):
            class_scores = known.cells.mean(torch.cat(deep.from_first))
        keys = known.cells.mean(torch.cat(deep.keys)) if deep.keys else None
        made = known.cells.sizes > 0
        pruned, tokens, start = [], [], 0
        for rows, raster in zip(features, known.places, strict=True):
            mine = made[start : start + len(rows)].nonzero().squeeze(1)
            flat = mine + start
            tokens.append(
                VisualTokens(
                    features=rows[mine],
                    object_scores=scores[0][flat],
                    deep_scores=scores[1][flat],
                    class_scores=None if class_scores is None else class_scores[flat],
                    keys=None if keys is None else keys[flat],
                    raster=raster,
                )
            )
            pruned.append(mine)
            start += len(rows)
        return Encoded(output, features, pruned, tokens)

    @staticmethod
    def _has_class_token(known: Structure) -> bool:
        """Whether the first token of each sequence goes into no visual token."""
        lengths = sequence_lengths(known.cells.layout)
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].to(known.cells.tokens.device)
        return not bool(torch.isin(starts, known.cells.tokens).any())


def images_of(output: Any) -> list[Tensor]:
    """The visual tokens of each image, ``(M, D)``, in what a path returned."""
    found = getattr(output, "pooler_output", None)
    if isinstance(found, Tensor) and found.dim() == 3:
        return list(found)
    if isinstance(found, (list, tuple)) and all(
        isinstance(x, Tensor) and x.dim() == 2 for x in found
    ):
        return list(found)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise TokenpassError(
        "the image features must be (images, tokens, width), or a list of (tokens, width), in "
        f"pooler_output; found {shape}"
    )


def detached(value: Any) -> Any:
    """The same without gradients, in containers of any depth."""
    return mapped(value, lambda x: x.detach())


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a container, in which every tensor is changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(x, change) for x in value)
    if isinstance(value, Mapping):
        made: Any = copy.copy(value)
        for name in value:
            made[name] = mapped(value[name], change)
        return made
    return value


@contextlib.contextmanager
def _recording(needed: bool) -> Iterator[None]:
    """Autograd can be switched on inside, even under inference mode; the mode is put back."""
    if not needed:
        yield
        return
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def _recorded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that autograd can work with: tensors of inference mode are copied."""
    made: dict[str, Any] = mapped(dict(inputs), lambda x: x.clone() if x.is_inference() else x)
    return made


def _is_table(x: Tensor) -> bool:
    return not x.is_floating_point() and x.dtype != torch.bool and x.numel() <= MAX_TABLE


def _key(inputs: Mapping[str, Any]) -> Key:
    """Shapes of the inputs and values of tables: inputs with equal keys have equal structure."""

    def part(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(part(x) for x in value)
        if not isinstance(value, Tensor):
            return value
        table = tuple(value.flatten().tolist()) if _is_table(value) else None
        return (tuple(value.shape), value.dtype, value.device, table)

    return tuple((name, part(value)) for name, value in sorted(inputs.items()))
