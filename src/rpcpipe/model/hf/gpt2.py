"""GPT-2 with its language-modelling head, as layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2PreTrainedModel

from rpcpipe.errors import require
from rpcpipe.model.hf.common import CausalLoss, Parts, positions, take
from rpcpipe.model.layers import Layer, Wired

_WIRES = ("attention_mask", "position_ids")


class Embeddings(nn.Module):
    """The part of GPT2Model before its blocks."""

    children_kept = ("wte", "wpe", "drop")

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embd_pdrop)

    def forward(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        ids, types, mask, position_ids = take(inputs, "input_ids", "token_type_ids", "attention_mask", "position_ids")
        position_ids = positions(ids, position_ids)
        hidden = self.wte(ids) + self.wpe(position_ids)
        if types is not None:
            hidden = hidden + self.wte(types)
        return self.drop(hidden), mask, position_ids


class Block(GPT2Block):
    """GPT2Block that builds the causal mask itself: the (time × time) mask would be larger to send than its row."""

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor) -> torch.Tensor:
        causal = create_causal_mask(self.attn.config, hidden, mask, None, position_ids)
        return super().forward(hidden, attention_mask=causal, position_ids=position_ids)


def lm_head(source: Any) -> tuple[dict[str, Layer], CausalLoss]:
    """Return the layers and the loss of GPT2LMHeadModel."""
    parts = Parts(source, GPT2PreTrainedModel)
    config = parts.config
    require(not config.add_cross_attention, "GPT-2 with cross-attention has a second input; a pipeline has one")
    layers: dict[str, Layer] = {
        "transformer": Wired(parts.layer("transformer", Embeddings, config, embedding="wte.weight"), gives=_WIRES),
        **{
            (path := f"transformer.h.{index}"): Wired(parts.layer(path, Block, config, layer_idx=index), takes=_WIRES)
            for index in range(config.n_layer)
        },
        "transformer.ln_f": parts.layer(
            "transformer.ln_f", nn.LayerNorm, config.hidden_size, eps=config.layer_norm_epsilon
        ),
        "lm_head": parts.lm_head(),
    }
    return layers, CausalLoss()
