"""Tiny models of the real classes with random weights, and prompts for them. No hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO, PAD, TEXT = 90, 91, 0, 80
"""Token ids: placeholders, padding, and the number of text tokens (from 1)."""

SIDE, PATCH = 32, 4
"""Pixels of an image and of a patch: 8 x 8 patches."""


Pixels = Callable[[Sequence[int]], tuple[dict[str, Any], list[int]]]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        build: A model with random weights, in eval mode.
        pixels: For prompts of some numbers of images, the encoder's inputs and the visual tokens of
            each image.
        typed: Name of the argument that gives tokens types, if the model takes one: 1 for visual
            tokens.
        answered: The type 1 is that of an answer, before which tokens attend to one another.
        cell: Patches in a row of those that make up a visual token.
    """

    build: Callable[[], Any]
    pixels: Pixels
    typed: str | None = None
    answered: bool = False
    cell: int = 1


def spread(model: Any) -> Any:
    """Weights large enough that every token matters, in eval mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def text(**more: Any) -> dict[str, Any]:
    """A Llama of two layers."""
    return {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
        **more,
    }


def tower(**more: Any) -> dict[str, Any]:
    """A vision tower of four layers."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        **more,
    }


def images(count: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *shape, generator=generator)


def prompts(family: Family, numbers: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Prompts with ``numbers`` images each, padded on the left, as one batch."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(2, TEXT, (count,), generator=generator).tolist()

    encoded, counts = family.pixels(numbers) if any(numbers) else ({}, [])
    left = iter(counts)
    rows = []
    for number in numbers:
        row = words(3)
        for _ in range(number):
            row += [IMAGE] * next(left) + words(2)
        rows.append(row + words(3))
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    made = {"input_ids": ids, "attention_mask": mask, **encoded}
    if family.typed:
        answer = torch.arange(length) >= length - 3
        types = answer.expand(ids.shape) if family.answered else ids == IMAGE
        made[family.typed] = types.long()
    return made


def _square(cell: int = 1) -> Pixels:
    tokens = (SIDE // PATCH // cell) ** 2

    def pixels(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        count = sum(numbers)
        return {"pixel_values": images(count, 3, SIDE, SIDE)}, [tokens] * count

    return pixels


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Model

    return spread(
        Model(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**tower()),
                text_config=LlamaConfig(**text()),
                image_token_id=IMAGE,
                vision_feature_layer=-2,
                vision_feature_select_strategy="default",
            )
        )
    )


def llava_next() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
    from transformers import LlavaNextForConditionalGeneration as Model

    return spread(
        Model(
            LlavaNextConfig(
                vision_config=CLIPVisionConfig(**tower()),
                text_config=LlamaConfig(**text()),
                image_token_id=IMAGE,
                image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]],
                vision_feature_layer=-2,
            )
        )
    )


ANY_SIZES = [(32, 48), (32, 64)]
"""Height and width of any-resolution images; both go into two crops, the first with padding."""


def _any_resolution(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    count = sum(numbers)
    side = SIDE // PATCH
    sizes = [ANY_SIZES[number % 2] for number in range(count)]
    tokens = [side * side + _unpadded(*size, side, 2 * side) for size in sizes]
    pixels = images(count, 3, 3, SIDE, SIDE)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, tokens


def _unpadded(height: int, width: int, rows: int, columns: int) -> int:
    """Tokens of a crop grid without padding, one line end for each row."""
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
    return rows * (columns + 1)


def llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig
    from transformers import LlavaOnevisionForConditionalGeneration as Model

    return spread(
        Model(
            LlavaOnevisionConfig(
                vision_config=SiglipVisionConfig(**tower(), vision_use_head=False),
                text_config=Qwen2Config(**text()),
                image_token_index=IMAGE,
                video_token_index=VIDEO,
                image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]],
            )
        )
    )


QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    }


def qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig
    from transformers import Qwen2VLForConditionalGeneration as Model

    vision = {"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": PATCH}
    return spread(
        Model(
            Qwen2VLConfig(
                vision_config=vision,
                text_config=text(rope_parameters=QWEN_ROPE),
                **_qwen_ids(),
            )
        )
    )


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1, 3],
    }
    return spread(
        Model(
            Qwen2_5_VLConfig(
                vision_config=vision,
                text_config=text(rope_parameters=QWEN_ROPE),
                **_qwen_ids(),
            )
        )
    )


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig
    from transformers import Qwen3VLForConditionalGeneration as Model

    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": PATCH,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 2],
    }
    rope = {**QWEN_ROPE, "mrope_interleaved": True}
    return spread(
        Model(
            Qwen3VLConfig(
                vision_config=vision, text_config=text(rope_parameters=rope), **_qwen_ids()
            )
        )
    )


def _packed(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    """Images of two grids, their patches in one sequence."""
    count = sum(numbers)
    grids = [[(1, 6, 8), (1, 4, 6)][number % 2] for number in range(count)]
    patches = sum(h * w for _, h, w in grids)
    pixels = images(patches, 3 * 2 * PATCH * PATCH)
    tokens = [h * w // 4 for _, h, w in grids]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, tokens


def internvl() -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config
    from transformers import InternVLForConditionalGeneration as Model

    sides = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    return spread(
        Model(
            InternVLConfig(
                vision_config=InternVLVisionConfig(**{**tower(), **sides}),
                text_config=Qwen2Config(**text()),
                image_token_id=IMAGE,
            )
        )
    )


def idefics3() -> Any:
    from transformers import Idefics3Config
    from transformers import Idefics3ForConditionalGeneration as Model

    return spread(
        Model(
            Idefics3Config(
                vision_config=tower(),
                text_config={"model_type": "llama", **text()},
                image_token_id=IMAGE,
                pad_token_id=PAD,
                scale_factor=2,
            )
        )
    )


def smolvlm() -> Any:
    from transformers import SmolVLMConfig
    from transformers import SmolVLMForConditionalGeneration as Model

    return spread(
        Model(
            SmolVLMConfig(
                vision_config=tower(),
                text_config={"model_type": "llama", **text()},
                image_token_id=IMAGE,
                pad_token_id=PAD,
                scale_factor=2,
            )
        )
    )


def paligemma() -> Any:
    from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
    from transformers import PaliGemmaForConditionalGeneration as Model

    return spread(
        Model(
            PaliGemmaConfig(
                vision_config=SiglipVisionConfig(
                    **tower(), projection_dim=32, vision_use_head=False
                ),
                text_config=GemmaConfig(**text()),
                image_token_index=IMAGE,
                projection_dim=32,
                tie_word_embeddings=False,
            )
        )
    )


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig
    from transformers import Gemma3ForConditionalGeneration as Model

    window = {"sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"]}
    return spread(
        Model(
            Gemma3Config(
                vision_config=SiglipVisionConfig(**tower(), vision_use_head=False),
                text_config=Gemma3TextConfig(**text(), **window, query_pre_attn_scalar=8),
                image_token_index=IMAGE,
                boi_token_index=92,
                eoi_token_index=93,
                mm_tokens_per_image=16,
                tie_word_embeddings=False,
            )
        )
    )


def mistral3() -> Any:
    from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig
    from transformers import Mistral3ForConditionalGeneration as Model

    return spread(
        Model(
            Mistral3Config(
                vision_config=PixtralVisionConfig(**tower()),
                text_config=MistralConfig(**text(), sliding_window=None),
                image_token_index=IMAGE,
                spatial_merge_size=2,
            )
        )
    )


def pixtral() -> Any:
    """Pixtral is LLaVA with a tower that packs images of any size."""
    from transformers import LlavaConfig, MistralConfig, PixtralVisionConfig
    from transformers import LlavaForConditionalGeneration as Model

    return spread(
        Model(
            LlavaConfig(
                vision_config=PixtralVisionConfig(**tower()),
                text_config=MistralConfig(**text(), sliding_window=None),
                image_token_id=IMAGE,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            )
        )
    )


def _sized(cell: int) -> Pixels:
    """Images of two sizes in one tensor with padding."""

    def pixels(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        count = sum(numbers)
        sizes = [[(SIDE, SIDE), (SIDE // 2, SIDE)][number % 2] for number in range(count)]
        tokens = [h * w // (PATCH * cell) ** 2 for h, w in sizes]
        return {
            "pixel_values": images(count, 3, SIDE, SIDE),
            "image_sizes": torch.tensor(sizes),
        }, tokens

    return pixels


def _nested(numbers: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    """Images by prompt; an image of zeros stands for none."""
    pixels = torch.zeros(len(numbers), max(numbers), 3, SIDE, SIDE)
    for row, number in enumerate(numbers):
        pixels[row, :number] = images(number + row, 3, SIDE, SIDE)[:number]
    return {"pixel_values": pixels}, [16] * sum(numbers)


FAMILIES: dict[str, Family] = {
    "llava": Family(llava, _square()),
    "llava_next": Family(llava_next, _any_resolution),
    "llava_onevision": Family(llava_onevision, _any_resolution),
    "qwen2_vl": Family(qwen2_vl, _packed, "mm_token_type_ids", cell=2),
    "qwen2_5_vl": Family(qwen2_5_vl, _packed, "mm_token_type_ids", cell=2),
    "qwen3_vl": Family(qwen3_vl, _packed, "mm_token_type_ids", cell=2),
    "internvl": Family(internvl, _square(2), cell=2),
    "idefics3": Family(idefics3, _nested, cell=2),
    "smolvlm": Family(smolvlm, _nested, cell=2),
    "paligemma": Family(paligemma, _square(), "token_type_ids", answered=True),
    "gemma3": Family(gemma3, _square(2), "token_type_ids", cell=2),
    "mistral3": Family(mistral3, _sized(2), cell=2),
    "pixtral": Family(pixtral, _sized(1)),
}
