# ruff: noqa: C408
"""Tiny vision-language models, from their configs."""

import torch
from tiny_models import COMMON as TEXT
from transformers import AutoConfig, AutoModelForImageTextToText

SEES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8)  # fmt: skip
MROPE = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)
IDS = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)

FAMILIES = {
    "qwen2_vl": dict(
        IDS,
        text_config=dict(TEXT, rope_parameters=MROPE),
        vision_config=dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4),
    ),
    "qwen2_5_vl": dict(
        IDS,
        text_config=dict(TEXT, rope_parameters=MROPE),
        vision_config=dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32,
                           patch_size=4),
    ),
    "qwen3_vl": dict(
        IDS,
        text_config=dict(TEXT, rope_parameters=MROPE),
        vision_config=dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32,
                           patch_size=4, num_position_embeddings=16, deepstack_visual_indexes=[0]),
    ),
    "llava": dict(
        text_config=dict(TEXT, model_type="llama"), vision_config=dict(SEES, model_type="clip_vision_model"),
        image_token_index=90,
    ),
    "gemma3": dict(
        text_config=dict(TEXT, sliding_window=6, query_pre_attn_scalar=8), vision_config=SEES,
        mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92,
    ),
    "mistral3": dict(
        text_config=dict(TEXT, model_type="mistral"), image_token_index=90,
        vision_config=dict(SEES, model_type="pixtral", head_dim=8),
    ),
    "idefics3": dict(
        text_config=dict(TEXT, model_type="llama"), vision_config=dict(SEES), image_token_id=90,
        scale_factor=1,
    ),
    "smolvlm": dict(
        text_config=dict(TEXT, model_type="llama"), vision_config=dict(SEES), image_token_id=90,
        scale_factor=1,
    ),
    "internvl": dict(
        text_config=dict(TEXT, model_type="qwen2"),
        vision_config=dict(SEES, image_size=[16, 16], patch_size=[8, 8]), image_token_id=90,
    ),
}  # fmt: skip


def build_vision(family, seed=0, **changes):
    config = AutoConfig.for_model(family, **dict(FAMILIES[family], **changes))
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
