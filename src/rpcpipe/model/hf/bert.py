"""BERT with the heads of its pre-training."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertLayer,
    BertOnlyMLMHead,
    BertPooler,
    BertPreTrainedModel,
    BertPreTrainingHeads,
)

from rpcpipe.errors import require
from rpcpipe.model.hf.common import IGNORED, MaskedLoss, Parts, label, summed, take
from rpcpipe.model.layers import Layer, Wired

_MASK = "attention_mask"
_DECODER = "predictions.decoder.weight"
_LABELS = ("labels", "next_sentence_label")


class Embeddings(BertEmbeddings):
    """BertEmbeddings that take the input dict and also return the attention mask."""

    def forward(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        ids, types, mask, position_ids = take(inputs, "input_ids", "token_type_ids", _MASK, "position_ids")
        return super().forward(input_ids=ids, token_type_ids=types, position_ids=position_ids), mask


class Block(BertLayer):
    """BertLayer that expands the attention mask itself: the expanded mask would be larger to send than its row."""

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        expanded = create_bidirectional_mask(self.attention.self.config, hidden, mask)
        return super().forward(hidden, expanded)


class Pooler(BertPooler):
    """BertPooler that returns (hidden, pooled)."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, super().forward(hidden)


class PreTrainingHeads(BertPreTrainingHeads):
    """BertPreTrainingHeads that take (hidden, pooled) and return their logits by name."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.tie_word_embeddings:
            self.predictions.decoder.bias = self.predictions.bias

    def forward(self, states: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        predictions, relationship = super().forward(*states)
        return {"prediction_logits": predictions, "seq_relationship_logits": relationship}


class MaskedHead(BertOnlyMLMHead):
    """BertOnlyMLMHead whose decoder bias is tied where the config ties the word embeddings."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.tie_word_embeddings:
            self.predictions.decoder.bias = self.predictions.bias


class PreTrainingLoss:
    """Masked language modelling plus next sentence prediction, each the mean over its labels in the whole batch.

    A micro-batch cannot know how many labels of the batch count. The driver calls ``prepare`` on the batch's
    targets, which adds that number per row. The mean over micro-batches, weighted by their shares of the
    rows, then equals the loss of the batch.
    """

    def prepare(self, targets: Any) -> dict[str, Any]:
        labels = {name: label(targets, name) for name in _LABELS}
        counted = {name: float((rows != IGNORED).sum()) / len(rows) for name, rows in labels.items()}
        return {**labels, "counted": counted}

    def __call__(self, output: Any, targets: Any) -> torch.Tensor:
        logits = output["prediction_logits"], output["seq_relationship_logits"]
        masked, following = (
            summed(scores, targets[name]) / targets["counted"][name]
            for scores, name in zip(logits, _LABELS, strict=True)
        )
        return (masked + following) / len(targets["labels"])


def _encoder(parts: Parts) -> dict[str, Layer]:
    config = parts.config
    require(not config.is_decoder, "BERT as a decoder is not cut into stages; pass a config with is_decoder=False")
    return {
        "bert.embeddings": Wired(
            parts.layer("bert.embeddings", Embeddings, config, embedding="word_embeddings.weight"), gives=_MASK
        ),
        **{
            (path := f"bert.encoder.layer.{index}"): Wired(parts.layer(path, Block, config, index), takes=_MASK)
            for index in range(config.num_hidden_layers)
        },
    }


def pre_training(source: Any) -> tuple[dict[str, Layer], PreTrainingLoss]:
    """Return the layers and the loss of BertForPreTraining."""
    parts = Parts(source, BertPreTrainedModel)
    pooler = parts.layer("bert.pooler", Pooler, parts.config)
    heads = parts.layer("cls", PreTrainingHeads, parts.config, embedding=_DECODER)
    return {**_encoder(parts), "bert.pooler": pooler, "cls": heads}, PreTrainingLoss()


def masked_lm(source: Any) -> tuple[dict[str, Layer], MaskedLoss]:
    """Return the layers and the loss of BertForMaskedLM."""
    parts = Parts(source, BertPreTrainedModel)
    return {**_encoder(parts), "cls": parts.layer("cls", MaskedHead, parts.config, embedding=_DECODER)}, MaskedLoss()
