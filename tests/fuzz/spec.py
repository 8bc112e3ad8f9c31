"""What a generated encoder looks like: plain data whose ``repr`` is the code that rebuilds it.

Every field knows its choices, the plainest first. The grammar draws from them, the simplifier of
failing cases goes back to the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any


def choice(*choices: Any, plain: int = 1) -> Any:
    """A field with these values.

    Args:
        choices: The plainest first: it is the default.
        plain: How often the default is drawn, compared with each of the others.
    """
    return field(default=choices[0], metadata={"choices": choices, "plain": plain})


@dataclass(frozen=True)
class Attention:
    """How softmax attention is spelled.

    Attributes:
        heads: Divides every width.
        spelling: Of the products and the softmax; ``"multihead"`` is ``nn.MultiheadAttention``,
            ``"weights"`` the same with the probabilities computed.
        projections: Of queries, keys and values.
        key_heads: Share of the heads that keys and values have, as ``heads / key_heads``.
        scale: What the scale is multiplied with.
        norm: Of queries and keys.
        position: What depends on where queries and keys lie.
        mask: What hides keys.
        heads_mixed: Whether heads see one another before and after the softmax.
        join: How the heads are put side by side again.
        window: Whether only tokens in the same half of the grid attend to one another.
    """

    heads: int = choice(2, 1, 4, plain=2)
    spelling: str = choice(
        "fused", "matmul", "bmm", "baddbmm", "einsum", "float32", "transposed", "keys first",
        "multihead", "weights", plain=2,
    )  # fmt: skip
    projections: str = choice(
        "joint", "heads outside", "chunks", "separate", "two", "views", "batched", plain=2
    )
    key_heads: int = choice(1, 2, plain=5)
    bias: bool = choice(True, False, plain=2)
    scale: str = choice("scores", "query", "key", "both", "divided")
    norm: str = choice("none", "layer", "unit", plain=3)
    position: str = choice("none", "relative", "distance", "rotary", "halves", "computed", plain=3)
    mask: str = choice("none", "added", "boolean", "keys", "causal", plain=12)
    heads_mixed: bool = choice(False, True, plain=8)
    join: str = choice("transpose", "permute", "cat", "contiguous view")
    window: bool = choice(False, True, plain=16)


@dataclass(frozen=True)
class Block:
    """Attention, MLP and the residual stream around them.

    Attributes:
        norms: ``"batch"`` stands for the mean and the variance that a batch norm has learned.
        placement: Of the norms; ``"parallel"`` is pre-norm with attention and MLP side by side.
        mlp: ``"depthwise"``: with a convolution over the grid; ``"excite"``: channels scaled by
            what the mean token says; ``"experts"``: each token goes to its best expert;
            ``"expert choice"``: each expert takes the tokens that suit it best.
        residual: How a branch is added.
        detour: What the branch of the attention, or the stream, goes through in vain.
        local: Whether a convolution over the grid is added to the stream before the block.
        built_in: Whether it is ``nn.TransformerEncoderLayer``, which knows heads, biases, where the
            norms are, and whether the MLP has ReLU.
    """

    attention: Attention = field(default_factory=Attention)
    norms: str = choice("layer", "root mean square", "written out", "batch", "none", plain=3)
    placement: str = choice("pre", "post", "sandwich", "parallel", "one sum", plain=3)
    mlp: str = choice(
        "gelu", "relu", "gated", "joint gate", "convolution", "none", "depthwise", "excite",
        "experts", "expert choice", plain=6,
    )  # fmt: skip
    residual: str = choice(
        "plus", "reversed", "in place", "scaled", "addcmul", "alpha", "weighted skip", plain=2
    )
    detour: str = choice(
        "none", "permutation", "flat", "grid", "split", "padded", "rolled", "flipped", "float64",
        "stacked", plain=5,
    )  # fmt: skip
    local: bool = choice(False, True, plain=16)
    built_in: bool = choice(False, True, plain=12)


@dataclass(frozen=True)
class Encoder:
    """A whole encoder.

    Attributes:
        grid: Rows and columns of patch tokens.
        patch: Side of a patch, pixels.
        embed: How patches become tokens.
        width: Channels; divisible by every number of heads.
        prefix: Class tokens before the patch tokens; none in layouts that are images.
        suffix: Registers after them; likewise.
        table: Positions that are added to the tokens.
        table_over: Whether they are added before or after class tokens join.
        layout: Of the stream: ``(B, N, C)``, ``(N, B, C)``, ``(B, C, N)``, ``(B, H, W, C)`` or
            ``(B, C, H, W)``.
        blocks: In order.
        shared: Whether all blocks are the first one.
        final_norm: Whether the stream is normalised at the end.
        head: What becomes of the tokens.
        extra: What is returned beside it.
        dead: Whether something is computed that nobody reads.
        double: Whether everything is in float64.
        autocast: Whether it runs under autocast to bfloat16, if it ``rounds`` then.
        broken: Whether the blocks are in another graph than the embedding, if it ``breaks`` then.
        batch: Images.
        seed: Of the weights and the images.
    """

    grid: tuple[int, int] = choice((2, 4), (2, 2), (4, 4), (3, 3), (3, 4), (4, 2), (1, 8), plain=2)
    patch: int = choice(2, 1, plain=3)
    embed: str = choice("convolution", "unfold", "reshape", "overlapping", "stem", "linear map")
    width: int = choice(8, 16, 4)
    prefix: int = choice(1, 0, 2)
    suffix: int = choice(0, 1, 2, plain=4)
    table: str = choice("learned", "none", "axial", "sinusoid", "computed", "sliced")
    table_over: str = choice("patches", "all")
    layout: str = choice("tokens", "sequence first", "channels first", "map", "image", plain=4)
    blocks: tuple[Block, ...] = (Block(),)
    shared: bool = choice(False, True, plain=6)
    final_norm: bool = choice(True, False)
    head: str = choice(
        "tokens", "class", "mean", "mean of all", "sum", "largest", "attention", "dense", "pair"
    )
    extra: str = choice("none", "hidden", "patches", "dictionary", "branch", "view", plain=4)
    dead: bool = choice(False, True, plain=4)
    double: bool = choice(True, False)
    autocast: bool = choice(False, True, plain=6)
    broken: bool = choice(False, True, plain=8)
    batch: int = choice(2, 1, 3)
    seed: int = 0

    @property
    def rounds(self) -> bool:
        """Whether products are rounded to bfloat16; which expert is chosen depends on that."""
        chooses = any(block.mlp in ("experts", "expert choice") for block in self.blocks)
        return self.autocast and not self.double and not chooses

    @property
    def breaks(self) -> bool:
        """Whether Dynamo makes two graphs; inside of a region of autocast it makes none."""
        return self.broken and not self.rounds

    @property
    def imagelike(self) -> bool:
        """Whether the stream has rows and columns, and so no room for other tokens."""
        return self.layout in ("map", "image")

    @property
    def before(self) -> int:
        """Tokens before the patch tokens."""
        return 0 if self.imagelike else self.prefix

    @property
    def after(self) -> int:
        """Tokens after the patch tokens."""
        return 0 if self.imagelike else self.suffix

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """All of them, class tokens and registers included."""
        return self.before + self.patches + self.after


@dataclass(frozen=True)
class Case:
    """What is tried.

    Attributes:
        encoder: The encoder.
        keep: The reduced budget.
        also: What is tried beside pruning with discarding.
    """

    encoder: Encoder = field(default_factory=Encoder)
    keep: int | float = choice(0.5, 0.25, 0.75, 1, 3)
    also: str = choice("merge", "eventful")

    def __str__(self) -> str:
        return f"Case({changed(self.encoder)}, keep={self.keep!r}, also={self.also!r})"


def simpler(spec: Any) -> Iterator[Any]:
    """Specs that are plainer than one in one thing, the boldest steps first."""
    for item in fields(spec):
        value = getattr(spec, item.name)
        if item.name == "blocks":
            for place in range(len(value) if len(value) > 1 else 0):
                yield replace(spec, blocks=value[:place] + value[place + 1 :])
            for place, block in enumerate(value):
                for other in simpler(block):
                    yield replace(spec, blocks=(*value[:place], other, *value[place + 1 :]))
        elif item.name == "attention":
            yield from (replace(spec, attention=other) for other in simpler(value))
        elif value != item.default:
            yield replace(spec, **{item.name: item.default})


def changed(spec: Any) -> str:
    """``repr`` of a spec with only what differs from the plainest one."""
    parts = []
    for item in fields(spec):
        value = getattr(spec, item.name)
        if item.name == "blocks":
            inner = ", ".join(changed(block) for block in value)
            parts.append(f"blocks=({inner},)")
        elif item.name == "attention":
            if value != Attention():
                parts.append(f"attention={changed(value)}")
        elif value != item.default:
            parts.append(f"{item.name}={value!r}")
    return f"{type(spec).__name__}({', '.join(parts)})"
