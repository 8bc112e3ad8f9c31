"""Builders of tiny models of the real classes, with random weights. No hub."""

from __future__ import annotations

from typing import Any

import torch

IMAGE, VIDEO, PAD, TEXT = 90, 91, 0, 80
"""Token ids: placeholders, padding, and the number of text tokens (from 1)."""

SIDE, PATCH = 32, 4
"""Pixels of an image and of a patch: 8 x 8 patches."""


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


PACKED = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": PATCH,
    "out_hidden_size": 32,
}
"""A tower for packed patches."""

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

    vision = {**PACKED, "window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3]}
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

    vision = {**PACKED, "num_position_embeddings": 64, "deepstack_visual_indexes": [1, 2]}
    rope = {**QWEN_ROPE, "mrope_interleaved": True}
    return spread(
        Model(
            Qwen3VLConfig(
                vision_config=vision, text_config=text(rope_parameters=rope), **_qwen_ids()
            )
        )
    )


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


def _nested(name: str) -> Any:
    """Idefics3 or SmolVLM, which take their images in lists for each prompt."""
    import transformers as library

    config = getattr(library, f"{name}Config")(
        vision_config=tower(),
        text_config={"model_type": "llama", **text()},
        image_token_id=IMAGE,
        pad_token_id=PAD,
        scale_factor=2,
    )
    return spread(getattr(library, f"{name}ForConditionalGeneration")(config))


def idefics3() -> Any:
    return _nested("Idefics3")


def smolvlm() -> Any:
    return _nested("SmolVLM")


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
