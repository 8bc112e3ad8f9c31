"""Builders of more families than the code was written with."""

from __future__ import annotations

from typing import Any

from tests.vlm.models import IMAGE, PACKED, QWEN_ROPE, SIDE, VIDEO, spread, text, tower

IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def vipllava() -> Any:
    import transformers as library

    config = library.VipLlavaConfig(
        vision_config=library.CLIPVisionConfig(**tower()),
        text_config=library.LlamaConfig(**text()),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -3, -4],
    )
    return spread(library.VipLlavaForConditionalGeneration(config))


def aya_vision() -> Any:
    import transformers as library

    config = library.AyaVisionConfig(
        vision_config=library.SiglipVisionConfig(**tower(), vision_use_head=False),
        text_config=library.Cohere2Config(**text()),
        image_token_index=IMAGE,
        downsample_factor=2,
    )
    return spread(library.AyaVisionForConditionalGeneration(config))


def glm4v() -> Any:
    import transformers as library

    ends = {f"{kind}_{end}_token_id": 92 for kind in ("image", "video") for end in ("start", "end")}
    config = library.Glm4vConfig(
        vision_config={**PACKED, "image_size": SIDE, "spatial_merge_size": 2},
        text_config=text(rope_parameters={**QWEN_ROPE, "partial_rotary_factor": 1.0}),
        **IDS,
        **ends,
    )
    return spread(library.Glm4vForConditionalGeneration(config))


def qwen3_5() -> Any:
    import transformers as library

    rope = {**QWEN_ROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    config = library.Qwen3_5Config(
        vision_config={**PACKED, "num_position_embeddings": 64},
        text_config=text(layer_types=["full_attention"] * 2, rope_parameters=rope),
        vision_start_token_id=92,
        vision_end_token_id=93,
        **IDS,
    )
    return spread(library.Qwen3_5ForConditionalGeneration(config))


def video_llama_3() -> Any:
    import transformers as library

    vision = {name: value for name, value in tower().items() if name != "image_size"}
    config = library.VideoLlama3Config(
        vision_config=vision, text_config=library.Qwen2Config(**text()), **IDS
    )
    return spread(library.VideoLlama3ForConditionalGeneration(config))


def lfm2_vl() -> Any:
    import transformers as library

    vision = {name: value for name, value in tower().items() if name != "image_size"}
    config = library.Lfm2VlConfig(
        vision_config=library.Siglip2VisionConfig(**vision, num_patches=64, vision_use_head=False),
        text_config=library.Lfm2Config(**text(layer_types=["full_attention"] * 2)),
        image_token_id=IMAGE,
        downsample_factor=2,
    )
    return spread(library.Lfm2VlForConditionalGeneration(config))


def janus() -> Any:
    import transformers as library

    config = library.JanusConfig(
        vision_config={**tower(), "projection_dim": 32, "num_image_tokens": 64},
        text_config=library.LlamaConfig(**text()),
        image_token_id=IMAGE,
    )
    return spread(library.JanusForConditionalGeneration(config))


def blip_2() -> Any:
    """A resampler: its visual tokens are queries, which look at the whole image."""
    import transformers as library

    config = library.Blip2Config(
        vision_config=tower(),
        qformer_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "encoder_hidden_size": 32,
        },
        text_config=library.LlamaConfig(**text()),
        num_query_tokens=8,
        image_token_index=IMAGE,
    )
    return spread(library.Blip2ForConditionalGeneration(config))
