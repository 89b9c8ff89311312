"""A small model of every family: its own config class, with what it has of known sizes made small.

Families are the model types that transformers maps to a causal language model. `small_config` shrinks the
sizes that a config has under names that families share; `NEEDS` holds what a family needs besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
HEADS = 4

_SIZES: Mapping[float, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    32: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size lru_width"
    " output_embedding_size word_embed_proj_dim attention_hidden_size",
    HEADS: "num_attention_heads n_head n_heads attention_heads num_heads decoder_attention_heads"
    " num_decoder_attention_heads encoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"
    " num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num linear_num_value_heads"
    " mamba_n_heads mamba_num_heads n_mamba_heads time_step_rank mamba_dt_rank qk_rope_head_dim"
    " qk_nope_head_dim rotary_dim indexer_budget floor_scale log_scaling_n_floor",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_encoder_layers"
    " encoder_layers num_blocks num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"
    " linear_num_heads num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k"
    " indexer_compress_ratio"
    " eos_token_id sep_token_id cls_token_id forced_eos_token_id",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group"
    " first_k_dense_replace num_dense_layers moe_layer_start_index n_groups mamba_n_groups mamba_ngroups"
    " bos_token_id decoder_start_token_id indexer_kv_heads",
    0: "pad_token_id",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff d_inner dim_ff feed_forward_size"
    " ffn_hidden_size intermediate_size_mlp dense_intermediate_size n_inner",
    # Many index heads: few would often give several tokens a score of exactly 0, and ties go either way.
    16: "index_n_heads indexer_n_heads moe_intermediate_size shared_expert_intermediate_size"
    " shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size"
    " shared_experts_intermediate_size kv_lora_rank q_lora_rank o_lora_rank mamba_d_head mamba_head_dim"
    " mamba_headdim rel_extent",
    8: "head_dim dim_head d_head kv_channels swa_head_dim attention_head_size v_head_dim attention_chunk_size"
    " state_size mamba_d_state ssm_state_size mamba_chunk_size chunk_size block_size linear_key_head_dim"
    " linear_value_head_dim linear_head_dim index_head_dim indexer_head_dim hidden_size_per_layer_input d_rel"
    " laurel_rank router_hidden_size hc_lowrank adapter_rank query_pre_attn_scalar",
    # Shorter than the longest document, so that windows matter.
    6: "sliding_window window_size attention_window_size sliding_window_size local_attention index_topk",
    64: "mamba_d_ssm",
    128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length"
    " max_target_positions",
    0.1: "initializer_range init_std",
}  # fmt: skip
"""Small values, and the names under which configs have them."""

_SMALL: Mapping[str, Any] = {
    **{name: size for size, names in _SIZES.items() for name in names.split()},
    "is_decoder": True,
    "is_encoder_decoder": False,
}

_DROPS = ("dropout", "pdrop", "layerdrop", "jitter")
"""What is in the names of everything that makes training random."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

NEEDS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
    "dots3_note_text": {
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), HEADS),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank"), 16),
        "swa_head_dim": 8,
        "swa_qk_nope_head_dim": 4,
        "swa_v_head_dim": 8,
        "head_dim": 8,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0] * 2,
    },
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None, "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "ministral": {"layer_types": ["full_attention", "sliding_attention"]},
    "ministral3": {
        "rope_parameters": {
            **_ROPE,
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "qwen2": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "roc_bert": {
        **dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), VOCABULARY),
        **dict.fromkeys(("shape_embed_dim", "pronunciation_embed_dim"), 8),
    },
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "n_mamba_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides small sizes, or to have every kind of its layers among few."""

NOT_BUILT: Mapping[str, str] = {
    "blt": "reads bytes through a patching model of its own",
    "gemma4_assistant": "drafts tokens from another model's hidden states",
    "gemma4_unified_assistant": "drafts tokens from another model's hidden states",
    "fuyu": "has image patches inside; its text model is persimmon",
    "git": "has an image encoder inside",
    "moshi": "models speech codes",
    "reformer": "trains on rows of a multiple of its chunks only",
    "musicgen": "models audio codes, four at a time",
    "musicgen_melody": "models audio codes, four at a time",
    "prophetnet": "its own loss is over several future tokens at once",
    "phi4_multimodal": "has image and audio encoders inside",
}
"""Families that are no decoders of text alone."""


def families() -> dict[str, list[str]]:
    """Each family that can be built, with the other model types that are the same class."""
    by_class: dict[str, list[str]] = {}
    for family, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if family not in NOT_BUILT and not name.endswith("ForConditionalGeneration"):
            by_class.setdefault(name, []).append(family)
    found = {}
    for name, members in by_class.items():
        # Named by the one whose config is the text model's own, if there is one; the shortest of those.
        own = [f for f in members if _text_config(f)[0] is CONFIG_MAPPING[f]] or members
        first = min(own, key=lambda f: (not name.lower().startswith(f.replace("_", "")), len(f)))
        found[first] = [f for f in members if f != first]
    return dict(sorted(found.items()))


def small_config(family: str, **changes: Any) -> Any:
    """The family's config with small sizes and nothing random; `changes` come last."""
    kind, values = _text_config(family)
    arguments = {name: size for name, size in _SMALL.items() if name in values}
    arguments |= {n: 0.0 for n, v in values.items() if any(d in n for d in _DROPS) and isinstance(v, float)}
    if values.get("kv_lora_rank") is not None:  # DeepSeek's attention: as many key heads, rotary width
        arguments["num_key_value_heads"] = HEADS
        if values.get("head_dim") == values["qk_rope_head_dim"]:
            arguments["head_dim"] = arguments["qk_rope_head_dim"]
    arguments |= _layer_lists(values)
    arguments |= dict(NEEDS.get(family, {})) | changes
    return kind(**arguments)


def _text_config(family: str) -> tuple[Any, dict[str, Any]]:
    """The config class of the family's text model, and its defaults."""
    default = CONFIG_MAPPING[family]()
    text = default.get_text_config(decoder=True)
    if type(text) is not type(default):
        default = text
    return type(default), default.to_dict()


def _layer_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with an entry per layer, cut down to a few layers with every kind of layer among them."""
    layers = values.get("num_hidden_layers")
    lists = {name: v for name, v in values.items() if isinstance(v, list) and len(v) == layers}
    if not lists:
        return {}
    kept: set[int] = set()
    for entries in lists.values():
        kinds = {str(entry): number for number, entry in reversed(list(enumerate(entries)))}
        if len(kinds) <= 4:  # otherwise every layer has an entry of its own
            kept |= set(kinds.values())
    kept |= set(range(2 - len(kept)))
    chosen = sorted(kept) if len(kept) > 1 else [0, 1]
    return {name: [v[i] for i in chosen] for name, v in lists.items()} | {"num_hidden_layers": len(chosen)}


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A small model with random weights; biases and norms are moved off 0 and 1, so that they matter."""
    config = small_config(family, **changes)
    architecture = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model
