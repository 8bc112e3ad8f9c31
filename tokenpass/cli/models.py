"""From what a user writes to a model and inputs that it runs on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module, util
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tokenpass.cli.screen import InputError
from tokenpass.errors import described

FORMS = "timm:NAME, torchvision:NAME, transformers:CLASS[:CONFIG.json], FILE.pt2, FILE.py:FUNCTION"

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet: how pictures are normalised for models that do not say otherwise."""

PREFIX = "tokenpass_file_"
"""Of the name under which a user's file is imported: Dynamo looks modules up by their names."""

DEFAULT_SHAPE = (3, 224, 224)
PICTURE_DIMS = 4
SEED = 0

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Loaded:
    """A model and what it runs on.

    Attributes:
        name: As the user wrote it.
        model: In eval mode.
        args: Inputs.
        kwargs: More inputs.
        mean: Of the channels of a picture; with ``std`` how it is normalised.
        random: Whether the weights are random.
        batch: How many pictures it takes at a time; ``None``: any number.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    random: bool = False
    batch: int | None = None

    @property
    def images(self) -> Tensor:
        """The input that holds pictures, ``(B, C, H, W)``.

        Raises:
            InputError: If there is none.
        """
        return self._inputs()[self._place()]  # type: ignore[no-any-return]

    def call(self, function: Callable[..., Any], images: Tensor | None = None) -> Any:
        """``function`` (the model, or what became of it) of the inputs, or of other pictures.

        Raises:
            InputError: If the model fails on them.
        """
        inputs = self._inputs()
        if images is not None:
            inputs[self._place()] = images
        args = [value for key, value in inputs.items() if isinstance(key, int)]
        kwargs = {key: value for key, value in inputs.items() if isinstance(key, str)}
        return function(*args, **kwargs)

    def one_by_one(self) -> Loaded:
        """The same, where it takes one picture at a time.

        Raises:
            InputError: If it takes another number.
        """
        if self.batch not in (None, 1):
            raise InputError(
                f"{self.name} takes {self.batch} pictures at a time: export it for one, "
                "or for any number (dynamic_shapes)"
            )
        return self

    def check(self) -> Loaded:
        """The same, after the model ran once.

        Raises:
            InputError: If it fails.
        """
        try:
            with torch.no_grad():
                self.call(self.model)
        except Exception as error:
            shapes = [tuple(x.shape) for x in self._inputs().values() if isinstance(x, Tensor)]
            raise InputError(
                f"{self.name} does not run on inputs of shape "
                f"{', '.join(map(str, shapes)) or 'none'} ({described(error)}): pass --input"
            ) from error
        return self

    def _inputs(self) -> dict[int | str, Any]:
        return dict[int | str, Any]([*enumerate(self.args), *self.kwargs.items()])

    def _place(self) -> int | str:
        for key, value in self._inputs().items():
            if _holds_pictures(value):
                return key
        raise InputError(f"{self.name} takes no pictures: none of its inputs is (B, C, H, W)")


def load(spec: str, shape: str | None, weights: str | None) -> Loaded:
    """The model that a user named.

    Args:
        spec: One of :data:`FORMS`.
        shape: Of an image or a batch, as numbers between commas; default: what the model says.
        weights: ``"random"``, ``"pretrained"``, or the path of a state dict; default random for
            what is built from a name.

    Raises:
        InputError: If there is no such model, or it cannot be loaded.
    """
    torch.manual_seed(SEED)
    wanted = None if shape is None else _shape(shape)
    head, _, rest = spec.partition(":")
    if head in LIBRARIES and rest:
        loaded = LIBRARIES[head](spec, rest, wanted, weights == "pretrained")
    elif spec.endswith(".pt2"):
        loaded = _exported(spec, wanted)
    elif ".py:" in spec:
        loaded = _function(spec, wanted)
    else:
        raise InputError(f"{spec} is no model: expected one of {FORMS}")
    if weights not in (None, "random", "pretrained"):
        assert weights is not None
        _load_weights(loaded, Path(weights))
        loaded = replace(loaded, random=False)
    return loaded


def _shape(text: str) -> Shape:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise InputError(f"--input {text}: expected channels,height,width, or a batch before them")
    return sizes


def _pictures(shape: Shape) -> Tensor:
    return torch.randn(shape if len(shape) == 4 else (1, *shape))


def _imported(library: str) -> Any:
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed: python -m pip install {error.name}"
        ) from error
    except Exception as error:
        raise InputError(f"{library} cannot be imported ({described(error)})") from error


def _built(spec: str, build: Callable[[], Any], fetched: bool) -> Any:
    try:
        return build().eval()
    except Exception as error:
        hint = ": pass --weights FILE, or --weights random" if fetched else ""
        raise InputError(f"{spec} cannot be built ({described(error)}){hint}") from error


def _by_architecture(spec: str, name: str, shape: Shape | None, fetched: bool) -> Loaded:
    library = _imported("timm")
    if not library.is_model(name):
        near = library.list_models(f"*{name.split('_')[0]}*")[:3]
        raise InputError(f"{spec}: timm has no such model" + _such_as(near))
    options = {} if shape is None else {"img_size": tuple(shape[-2:])}

    def build() -> Any:
        try:
            return library.create_model(name, pretrained=fetched, **options)
        except TypeError:
            return library.create_model(name, pretrained=fetched)

    model = _built(spec, build, fetched)
    config = model.pretrained_cfg
    images = _pictures(shape or tuple(config.get("input_size", DEFAULT_SHAPE)))
    mean, std = (tuple(config.get(key, other)) for key, other in (("mean", MEAN), ("std", STD)))
    return Loaded(spec, model, (images,), {}, mean, std, random=not fetched)


def _by_builder(spec: str, name: str, shape: Shape | None, fetched: bool) -> Loaded:
    models = _imported("torchvision").models
    if name not in models.list_models():
        near = [other for other in models.list_models() if other[:3] == name[:3]][:3]
        raise InputError(f"{spec}: torchvision has no such model" + _such_as(near))
    weights = "DEFAULT" if fetched else None
    model = _built(spec, lambda: models.get_model(name, weights=weights), fetched)
    return Loaded(spec, model, (_pictures(shape or DEFAULT_SHAPE),), {}, random=not fetched)


def _by_class(spec: str, rest: str, shape: Shape | None, fetched: bool) -> Loaded:
    library = _imported("transformers")
    name, _, source = rest.partition(":")
    kind = getattr(library, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(f"{spec}: transformers has no model class {name}")
    if source and not Path(source).exists():
        raise InputError(f"{spec}: there is no file {source}")

    stored = bool(source) and Path(source).is_dir()

    def build() -> Any:
        if stored:
            return kind.from_pretrained(source)  # type: ignore[attr-defined]
        settings = json.loads(Path(source).read_text(encoding="utf-8")) if source else {}
        return kind(kind.config_class(**settings))  # type: ignore[attr-defined]

    if fetched and not stored:
        raise InputError(f"{spec}: pretrained weights of transformers lie in a folder: name it")
    model = _built(spec, build, fetched)
    config = model.config
    side = getattr(config, "image_size", DEFAULT_SHAPE[-1])
    sides = tuple(side) if isinstance(side, (tuple, list)) else (side, side)
    channels = getattr(config, "num_channels", DEFAULT_SHAPE[0])
    images = _pictures(shape or (channels, *sides))
    return Loaded(spec, model, (), {model.main_input_name: images}, random=not stored)


LIBRARIES: dict[str, Callable[[str, str, Shape | None, bool], Loaded]] = {
    "timm": _by_architecture,
    "torchvision": _by_builder,
    "transformers": _by_class,
}


def _such_as(near: list[str]) -> str:
    return f" (there are {', '.join(near)}, ...)" if near else ""


def _exported(spec: str, shape: Shape | None) -> Loaded:
    _existing(spec)
    try:
        program = torch.export.load(spec)
    except Exception as error:
        raise InputError(f"{spec} is no exported program ({described(error)})") from error
    args, kwargs = program.example_inputs or ((), {})
    loaded = _with_shape(Loaded(spec, program.module(), tuple(args), kwargs), shape)
    return replace(loaded, batch=_batch_of(program))


def _batch_of(program: torch.export.ExportedProgram) -> int | None:
    """How many pictures a program takes at a time; ``None``: any number."""
    given = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name in given and _holds_pictures(value):
            return value.shape[0] if isinstance(value.shape[0], int) else None
    return None


def _holds_pictures(value: object) -> TypeGuard[Tensor]:
    """Whether an input is ``(B, C, H, W)``."""
    return isinstance(value, Tensor) and value.dim() == PICTURE_DIMS and value.is_floating_point()


def _function(spec: str, shape: Shape | None) -> Loaded:
    path, _, name = spec.rpartition(":")
    file = _existing(path)
    found = util.spec_from_file_location(f"{PREFIX}{file.stem}", file)
    if found is None or found.loader is None:
        raise InputError(f"{path} cannot be imported")
    module = util.module_from_spec(found)
    sys.modules[found.name] = module
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        found.loader.exec_module(module)
        function = getattr(module, name, None)
        made = function() if callable(function) else None
    except Exception as error:
        raise InputError(f"{spec} fails ({described(error)})") from error
    if function is None:
        raise InputError(f"{path} has no function {name}")
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise InputError(f"{spec} must return a model and its inputs, as (model, inputs)")
    model, inputs = made
    if isinstance(model, nn.Module):
        model.eval()
    if isinstance(inputs, Mapping):
        loaded = Loaded(spec, model, (), dict(inputs))
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        loaded = Loaded(spec, model, args, {})
    return _with_shape(loaded, shape)


def _with_shape(loaded: Loaded, shape: Shape | None) -> Loaded:
    """The same on pictures of another shape."""
    if shape is None and (loaded.args or loaded.kwargs):
        return loaded
    images = _pictures(shape or DEFAULT_SHAPE)
    if not (loaded.args or loaded.kwargs):
        return replace(loaded, args=(images,))
    place = loaded._place()
    if isinstance(place, str):
        return replace(loaded, kwargs={**loaded.kwargs, place: images})
    args = (*loaded.args[:place], images, *loaded.args[place + 1 :])
    return replace(loaded, args=args)


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}")
    return Path(path)


def _load_weights(loaded: Loaded, path: Path) -> None:
    _existing(str(path))
    try:
        if path.suffix == ".safetensors":
            state = _imported("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} holds no weights ({described(error)})") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, Mapping) else state
    if not (isinstance(loaded.model, nn.Module) and isinstance(state, Mapping)):
        raise InputError(f"{path} holds no state dict of a module")
    own = loaded.model.state_dict()
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    other = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    wrong = {"missing": sorted(missing), "unknown": sorted(unknown), "of other shapes": other}
    counts = [f"{len(names)} {word} ({names[0]}, ...)" for word, names in wrong.items() if names]
    if counts:
        raise InputError(f"{path} does not fit {loaded.name}: tensors {', '.join(counts)}")
    loaded.model.load_state_dict(state)
