"""Tiny models of every family of causal language models that the installed transformers has."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rpcpipe.model.hf.recipe import Recipe

VOCABULARY, LAYERS, MOST = 99, 3, 10_000_000

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "num_expert_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "router_hidden_size"), 16),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "index_n_heads": 2,
}  # fmt: skip
DROPS = (
    "hidden_dropout", "attention_dropout", "dropout", "resid_pdrop", "embd_pdrop", "emb_pdrop", "attn_pdrop",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "summary_first_dropout",
    "layerdrop", "decoder_layerdrop", "embed_dropout", "resid_dropout",
)  # fmt: skip
LATENT = {"num_key_value_heads": 4}  # attention of low rank has no groups of heads
QUERIES = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text",
            "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "sarvam_mla", "youtu",
        ),
        LATENT,
    ),
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "shared_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "jamba": {"mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "dots1": {"n_shared_experts": 1},
    "roc_bert": {
        "pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32}},
    "dots3_note": {"text_config": LATENT, "audio_config": LATENT, "vision_config": LATENT},
    "dory": {
        "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "mlp", "full_attention"],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 3},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "qwen4_exp_text": QUERIES,
    "qwen4_exp": {"text_config": QUERIES},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4, "use_mamba_kernels": False,
        "num_key_value_heads": 4,
    },
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "xlstm": {"mode": "train_with_padding", "return_last_states": False, "qk_dim_factor": 1.0},
}  # fmt: skip


def families() -> dict[str, type[PreTrainedModel]]:
    """The class of every family, by its type of model."""
    found = {}
    for family, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found[family] = getattr(transformers, names if isinstance(names, str) else names[0])
    return found


def configuration(family: str, cls: type[PreTrainedModel], **more: Any) -> Any:
    """A tiny config of the family, of the class that ``cls`` takes."""
    kind = getattr(cls, "config_class", None) or CONFIG_MAPPING[family]
    config = tiny(kind, {**SPECIAL.get(family, {}), **more})
    config.architectures = [cls.__name__]
    return config


def tiny(kind: Any, special: dict[str, Any]) -> Any:
    """A config of the class ``kind`` with tiny sizes, as have those inside of it, and layers of every type."""
    fields = {field.name for field in dataclasses.fields(kind)}
    alias = getattr(kind, "attribute_map", None) or {}
    default = kind()
    drops = {name: 0.0 for name in DROPS if getattr(default, name, 0)}
    wanted = {**SIZES, **drops}
    chosen = {alias.get(name, name): value for name, value in wanted.items()}
    for name in ("layer_types", "mlp_layer_types"):
        if types := getattr(default, name, None):
            chosen[name] = [list(dict.fromkeys(types))[index % len(set(types))] for index in range(LAYERS)]
    inside = getattr(kind, "sub_configs", None) or {}
    for name in inside:
        if (inner := getattr(default, name, None)) is not None:
            chosen[name] = tiny(type(inner), special.get(name, {}))
    plain = {name: value for name, value in special.items() if name not in inside}
    return kind(**{**{name: value for name, value in chosen.items() if name in fields}, **plain})
