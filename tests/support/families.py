"""Tiny models of every family of causal language models that the installed transformers has."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rpcpipe.model.hf.cut import cut
from rpcpipe.model.hf.losses import RoutedLoss
from rpcpipe.model.hf.recording import recorders

VOCABULARY, LAYERS, MOST = 99, 3, 10_000_000

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    "encoder_layers": LAYERS,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "num_expert_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "router_hidden_size"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "mamba_d_state"), 8),
    **dict.fromkeys(("linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
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
DOTS = {
    "num_key_value_heads": 4, "head_dim": 16, "shared_experts_intermediate_size": 16, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_v_head_dim": 8, "swa_qk_nope_head_dim": 8,
    "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
}  # fmt: skip
QUERIES = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
STRICT = {
    "Gemma4AssistantConfig": {
        "text_config": {
            "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 3,
            "num_hidden_layers": 3,
        },
    },
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32",
            "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "sarvam_mla", "youtu",
        ),
        LATENT,
    ),
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "big_bird": {"attention_type": "original_full"},  # a batch shorter than its blocks changes the unsplit model so
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "shared_intermediate_size": 16,
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
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32},
    },
    "dots3_note": DOTS,
    "dots3_note_text": DOTS,
    "dory": {
        "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 3},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "qwen4_exp_text": QUERIES,
    "qwen4_exp": QUERIES,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4, "use_mamba_kernels": False,
        "num_key_value_heads": 4,
    },
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
}  # fmt: skip


ELSEWHERE = "lists of blocks"
HANDED = "hand more than hidden states to each other"
ONLY_FROM_A_MODEL = {"xlstm": "gives no initial values to a"}
# What transformers itself does not read back from what it saves: from_pretrained draws it anew.
LOST = {"youtu": {"model.embed_tokens.weight", "lm_head.weight"}}
REFUSED = {
    "blt": ELSEWHERE,
    "dory": "is not called with what the one before it returned alone",
    "gemma3": ELSEWHERE,
    "gemma3n": f"timm|{ELSEWHERE}",
    "gemma3n_text": ELSEWHERE,
    "gemma4_assistant": "keys and values of others",
    "gemma4_unified_assistant": "keys and values of others",
    "git": ELSEWHERE,
    "glm_moe_dsa": HANDED,
    "got_ocr2": ELSEWHERE,
    "hrm_text": ELSEWHERE,
    "hy_v4": HANDED,
    "inkling2_loop_text": "uses weights of the part before them",
    "inkling2_text": "uses weights of the part before them",
    "moss_transcribe_diarize": ELSEWHERE,
    "musicgen": ELSEWHERE,
    "musicgen_melody": ELSEWHERE,
    "phi4_multimodal": ELSEWHERE,
    "prophetnet": "cross-attention",
    "reformer": "forward without weights failed",
    "rwkv": HANDED,
    "xlm": ELSEWHERE,
    "xlnet": HANDED,
    "zaya": HANDED,
}
"""What a pipeline cannot carry, and what the refusal says."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What the docs say of a family."""

    family: str
    cls: str
    parts: str
    auxiliary: bool = False

    def __str__(self) -> str:
        return f"| {self.family} | `{self.cls}` | {self.parts} | {'yes' if self.auxiliary else ''} |"


def row(family: str, layers: Mapping[str, Any], auxiliary: bool) -> Row:
    """The row of a family, from the layers into which its tiny model is cut; blocks are one name with a star."""
    names = [re.sub(r"\.\d+$", ".*", name) for name in layers]
    parts = ", ".join(f"`{name}`" for name in dict.fromkeys(names))
    return Row(family, families()[family].__name__, parts, auxiliary)


def refused(family: str) -> Row:
    """The row of a family that is refused."""
    return Row(family, families()[family].__name__, f"refused: {REFUSED[family].rpartition('|')[2]}")


PAGE = Path(__file__).parents[2] / "docs" / "guide" / "transformers-families.md"
HEAD = """# Families of transformers

Every class of causal language models that transformers 5.24 has, and the layers that `rp.from_transformers` cuts it
into ([transformers.md](transformers.md)). `tests/numerics/test_families.py` trains a tiny model of each beside the
unsplit model, and fails if a line here is not what it finds; this writes the page anew:

```
PYTHONPATH=tests python -m support.families
```

The last column: with `output_router_logits=True` the model adds a loss of its routers, and the pipeline the same.

| type of model | class | layers | loss of routers |
|---|---|---|---|
"""


def main() -> None:
    """Write the page."""
    lines = []
    for family, cls in families().items():
        if family in REFUSED:
            lines.append(refused(family))
            continue
        layers, loss, _ = cut(configuration(family, cls))
        lines.append(row(family, layers, isinstance(loss, RoutedLoss)))
    PAGE.write_text(HEAD + "".join(f"{line}\n" for line in lines))


def families() -> dict[str, type[PreTrainedModel]]:
    """The class of every family, by its type of model."""
    found = {}
    for family, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found[family] = getattr(transformers, names if isinstance(names, str) else names[0])
    return found


def configuration(family: str, cls: type[PreTrainedModel], **more: Any) -> Any:
    """A tiny config of the family, of the class that ``cls`` takes; it counts the loss of routers, if there is one."""
    kind = getattr(cls, "config_class", None) or CONFIG_MAPPING[family]
    config = tiny(kind, {**SPECIAL.get(family, {}), **more})
    config.architectures = [cls.__name__]
    if recorders(cls) and hasattr(text := config.get_text_config(), "output_router_logits"):
        text.output_router_logits = True
    return config


def tiny(kind: Any, special: dict[str, Any]) -> Any:
    """A config of the class ``kind`` with tiny sizes, as have those inside of it, and layers of every type."""
    fields = {field.name for field in dataclasses.fields(kind)}
    alias = getattr(kind, "attribute_map", None) or {}
    default = kind(**STRICT.get(kind.__name__, {}))
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


if __name__ == "__main__":
    main()
