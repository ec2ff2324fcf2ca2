"""Llama with its language-modelling head, as layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from rpcpipe.model.hf.common import CausalLoss, Parts, positions, take
from rpcpipe.model.layers import Layer, Wired

_WIRES = ("attention_mask", "position_ids", "rotary")
Rotary = tuple[torch.Tensor, torch.Tensor]


class Embeddings(nn.Module):
    """The part of LlamaModel before its layers; it gives all of them the cosines and sines of the rotary angles."""

    children_kept = ("embed_tokens", "rotary_emb")

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Rotary]:
        ids, mask, position_ids = take(inputs, "input_ids", "attention_mask", "position_ids")
        position_ids = positions(ids, position_ids)
        hidden = self.embed_tokens(ids)
        return hidden, mask, position_ids, self.rotary_emb(hidden, position_ids)


class Block(LlamaDecoderLayer):
    """LlamaDecoderLayer that builds the causal mask itself."""

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor, rotary: Rotary
    ) -> torch.Tensor:
        causal = create_causal_mask(self.self_attn.config, hidden, mask, None, position_ids)
        return super().forward(
            hidden,
            attention_mask=causal,
            position_ids=position_ids,
            position_embeddings=rotary,
        )


def causal_lm(source: Any) -> tuple[dict[str, Layer], CausalLoss]:
    """Return the layers and the loss of LlamaForCausalLM."""
    parts = Parts(source, LlamaPreTrainedModel)
    config = parts.config
    layers: dict[str, Layer] = {
        "model": Wired(parts.layer("model", Embeddings, config, embedding="embed_tokens.weight"), gives=_WIRES),
        **{
            (path := f"model.layers.{index}"): Wired(parts.layer(path, Block, config, index), takes=_WIRES)
            for index in range(config.num_hidden_layers)
        },
        "model.norm": parts.layer("model.norm", LlamaRMSNorm, config.hidden_size, eps=config.rms_norm_eps),
        "lm_head": parts.lm_head(),
    }
    return layers, CausalLoss()
