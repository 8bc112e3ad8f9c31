"""The recorded Eventful runs, and gates and buffers in plain PyTorch.

`Reference` steps through an `OracleEncoder` frame by frame, written from section 1.3 of the data's
README. It computes all tokens and picks with masks: slow, free of indices, and nothing of it is
shared with tokenpass.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.eventful_encoder import OracleBlock, OracleEncoder, Shape, pooled, windows

DATA = Path(__file__).resolve().parents[2] / "shared" / "oracle" / "eventful"
GATES = ("qkv", "projection", "mlp")
"""The gates of a block that choose, in the order in which they do."""
CLASSES = {
    "Block": "dense",
    "EventfulTokenwiseBlock": "tokenwise",
    "EventfulMatmul1Block": "matmul1",
    "EventfulBlock": "full",
}

Masks = Mapping[str, Tensor]


# ---------------------------------------------------------------- recorded cases


@dataclass(frozen=True)
class Case:
    """One recorded run: what ran on which frames, and what came of it."""

    raw: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.raw["name"])

    @property
    def kind(self) -> str:
        """How blocks without windows compute; those with windows are ``tokenwise``."""
        return CLASSES[self.raw["config"]["block_class"]]

    @property
    def before_norm(self) -> bool:
        return bool(self.raw["config"]["block_extra"].get("gate_before_ln", False))

    @property
    def policy(self) -> dict[str, Any]:
        return dict(self.raw["policy"] or {})

    @property
    def ties(self) -> frozenset[int]:
        """Frames in which tokens with equal errors stood on both sides of the cut."""
        return frozenset(self.raw["tie_frames"])

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return dict(load_file(DATA / f"{self.name}.safetensors"))

    @cached_property
    def frames(self) -> Tensor:
        """``(12, B, N, D)``."""
        frames: Tensor = load_file(DATA / self.raw["inputs"])["x"]
        return frames

    def gates(self) -> list[str]:
        depth = self.raw["config"]["depth"]
        return [f"blocks.{block}.{gate}_gate" for block in range(depth) for gate in GATES]

    def masks(self, frame: int) -> dict[str, Tensor]:
        """Recorded selections, ``(B, N)`` bool."""
        return {gate: self.tensors[f"mask.{gate}"][frame].bool() for gate in self.gates()}

    def counts(self, frame: int) -> dict[str, int]:
        """Recorded multiply-adds of a frame, those that are zero left out."""
        found = self.raw["counts_per_frame"][frame]
        return {name.removesuffix("_flops"): n for name, n in found.items() if n}

    def encoder(self) -> OracleEncoder:
        """The dense encoder with the recorded weights."""
        config, weights = self.raw["config"], {}
        for name in self.raw["weights"]:
            weights.update(load_file(DATA / name))
        extra = config["block_extra"]
        encoder = OracleEncoder(
            Shape(
                dim=config["dim"],
                heads=config["heads"],
                depth=config["depth"],
                grid=tuple(config["grid"]),
                hidden=config["dim"] * config["mlp_ratio"],
                class_token=config["class_token"],
                window=tuple(extra.get("window_size", ())),
                windowed=frozenset(config["window_indices"]),
                relative="relative_embedding_size" in extra,
                pool=extra.get("pool_size") or 1,
                product=getattr(torch, extra.get("matmul_2_cast") or "", None),
            )
        )
        encoder.load_state_dict(weights)
        return encoder.eval()


def recorded() -> list[Case]:
    path = DATA / "cases.json"
    if not path.is_file():
        return []
    return [Case(raw) for raw in json.loads(path.read_text())["cases"]]


# ---------------------------------------------------------------- gates, frame by frame


@dataclass
class Reference:
    """Eventful inference of an encoder; the first frame after `reset` is a flush.

    Attributes:
        kind: ``tokenwise``, ``matmul1`` or ``full`` attention of the blocks without windows.
        policy: The recorded policy: ``k``, ``fraction`` or ``threshold``, and perhaps ``order``.
        before_norm: Whether gates stand before the layer norms.
        selected: The last frame's masks ``(B, N)`` by gate.
        errors: What they were chosen by; empty after a flush.
        counts: Multiply-adds of the last frame, those that are zero left out.
    """

    encoder: OracleEncoder
    kind: str
    policy: Mapping[str, Any]
    before_norm: bool = False
    selected: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    _state: dict[str, Tensor] = field(default_factory=dict)
    _forced: Masks = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case) -> Reference:
        return cls(case.encoder(), case.kind, case.policy, case.before_norm)

    def reset(self) -> None:
        self._state.clear()

    @torch.no_grad()
    def step(self, x: Tensor, forced: Masks | None = None) -> Tensor:
        """One frame ``(B, N, D)``; gates named in ``forced`` take that mask instead of choosing."""
        self.selected, self.errors, self.counts = {}, {}, Counter()
        self._forced = forced or {}
        x = self.encoder.position_encoding(x)
        self.counts["add"] += x.numel()
        for name, block in self._blocks():
            x = self._block(name, block, x)
        self.counts = +self.counts
        return x

    def _blocks(self) -> Iterator[tuple[str, OracleBlock]]:
        for index, block in enumerate(self.encoder.blocks):
            assert isinstance(block, OracleBlock)
            yield f"blocks.{index}.", block

    def _block(self, name: str, block: OracleBlock, x: Tensor) -> Tensor:
        norm, second = block.input_layer_norm, block.mlp_layer_norm
        qkv, chosen = self._gated(name + "qkv", x, norm, (block.qkv,))
        heads = self._attention(name, block, qkv, chosen)
        out, _ = self._gated(name + "projection", heads, None, (block.projection,))
        x = x + out
        gelu = nn.GELU()
        out, _ = self._gated(name + "mlp", x, second, (block.mlp_1, gelu, block.mlp_2))
        self.counts["add"] += 2 * x.numel()
        return x + out

    def _gated(
        self, name: str, x: Tensor, norm: nn.Module | None, layers: tuple[nn.Module, ...]
    ) -> tuple[Tensor, Tensor]:
        """Gate, ``layers`` on what it lets through, buffer: all rows, and the mask."""
        normed = x if norm is None else norm(x)
        chosen = self._gate(name + "_gate", x if self.before_norm else normed)
        value, rows = normed, int(chosen.sum())
        for layer in layers:
            value = layer(value)
            if isinstance(layer, nn.Linear):
                self.counts["linear"] += rows * layer.weight.numel()
                self.counts["bias"] += rows * layer.out_features
        return self._keep(name + "_buffer", value, chosen[..., None]), chosen

    def _keep(self, name: str, value: Tensor, where: Tensor) -> Tensor:
        """Write ``value`` into the state where a mask says so; the first time everywhere."""
        if name in self._state:
            value = torch.where(where, value, self._state[name])
        self._state[name] = value
        return value

    def _gate(self, name: str, value: Tensor) -> Tensor:
        if name in self._state:
            error = value - self._state[name]
            error = torch.linalg.vector_norm(error, self.policy.get("order", 2), dim=-1)
            self.errors[name] = error
            chosen = self._forced[name] if name in self._forced else self._choose(error)
            self.counts["gate"] += value.numel()
        else:
            chosen = torch.ones(value.shape[:2], dtype=torch.bool)
        self._keep(name, value, chosen[..., None])
        self.selected[name] = chosen
        return chosen

    def _choose(self, error: Tensor) -> Tensor:
        if "threshold" in self.policy:
            return error.gt(self.policy["threshold"])
        tokens = error.shape[1]
        k = self.policy["k"] if "k" in self.policy else int(self.policy["fraction"] * tokens)
        best = error.topk(k, dim=1).indices
        return torch.zeros_like(error, dtype=torch.bool).scatter_(1, best, True)

    def _attention(self, name: str, block: OracleBlock, qkv: Tensor, chosen: Tensor) -> Tensor:
        """``(B, N, 3 D)`` to ``(B, N, D)``."""
        if block.windowed or self.kind == "tokenwise":
            self._count_dense(block, qkv)
            return block.attention(qkv)
        q, k, v = block.heads(qkv)
        columns = self._columns(block, chosen)
        flush = name + "scores" not in self._state
        where = chosen[:, None, :, None] | columns[:, None, None, :]
        scores = self._keep(name + "scores", block.scores(q, k), where)
        weights = block.weights(q, scores)
        if flush:
            self._count_dense(block, qkv)
        else:
            self._count_gated(block, qkv, int(chosen.sum()), int(columns.sum()), k.shape[2])
        a, b = block.cast(weights), block.cast(v)
        mixed = self._by_delta(name, a, b, columns) if self.kind == "full" else a @ b
        return mixed.to(v.dtype).transpose(1, 2).flatten(2)

    @staticmethod
    def _columns(block: OracleBlock, chosen: Tensor) -> Tensor:
        """Keys ``(B, Nk)`` in which a chosen token has a part."""
        shape = block.shape
        if shape.pool == 1:
            return chosen
        parts: Tensor = pooled(chosen[:, None, :, None].to(torch.float32), shape)
        return parts[:, 0, :, 0] > 0

    def _by_delta(self, name: str, weights: Tensor, v: Tensor, columns: Tensor) -> Tensor:
        """Weights ``(B, h, N, Nk)`` and values ``(B, h, Nk, d)``, only changed keys looked at."""
        row, column = columns[:, None, :, None], columns[:, None, None, :]
        if name + "product" not in self._state:
            product = weights @ v
        else:
            dv = torch.where(row, v - self._state[name + "v"], 0)
            da = torch.where(column, weights - self._state[name + "a"], 0)
            product = self._state[name + "product"] + torch.where(column, weights, 0) @ dv
            product = product + da @ torch.where(row, v - dv, 0)
        self._keep(name + "v", v, row)
        self._keep(name + "a", weights, column)
        self._state[name + "product"] = product
        return product

    def _count_dense(self, block: OracleBlock, qkv: Tensor) -> None:
        """Both products over the windows, padding included, or over all (pooled) keys."""
        shape = block.shape
        if block.windowed:
            qkv = windows(qkv, block.qkv.bias, shape)
        keys = qkv.shape[1] // shape.pool**2
        self.counts["matmul"] += 2 * qkv.shape[0] * qkv.shape[1] * keys * shape.dim
        self._count_relative(block, qkv)

    def _count_gated(
        self, block: OracleBlock, qkv: Tensor, rows: int, columns: int, keys: int
    ) -> None:
        """``rows`` and ``columns`` that changed, over the whole batch; all products over keys."""
        batch, tokens, dim = len(qkv), qkv.shape[1], block.shape.dim
        self.counts["matmul"] += (rows * keys + tokens * columns) * dim
        self._count_relative(block, qkv)
        if self.kind == "matmul1":
            self.counts["matmul"] += batch * tokens * keys * dim
            return
        self.counts["matmul"] += 2 * tokens * columns * dim
        self.counts["gate"] += batch * keys * (dim + block.shape.heads * tokens)
        self.counts["accumulator"] += columns * dim + 2 * batch * tokens * dim

    def _count_relative(self, block: OracleBlock, qkv: Tensor) -> None:
        if block.shape.relative:
            size, (batch, tokens, _) = block.relative_position.size, qkv.shape
            self.counts["einsum"] += batch * tokens * sum(size) * block.shape.dim
            self.counts["add"] += 2 * batch * block.shape.heads * tokens**2
