"""The losses of transformers' heads, normalised over the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from rpcpipe.errors import ArgumentError

IGNORED = -100  # the label that all losses of transformers ignore
_PRE_TRAINING = ("labels", "next_sentence_label")
# (sum, number of labels that count) of one micro-batch
Counted = tuple[torch.Tensor, torch.Tensor]


class NoLoss:
    """Stands for the loss of a model that has none."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, output: Any, targets: Any) -> torch.Tensor:
        raise ArgumentError(f"from_transformers does not know the loss of {self._name}; pass loss=…")


def label(targets: Any, name: str) -> torch.Tensor:
    """Return the targets called ``name``; raises ArgumentError if there are none."""
    if not isinstance(targets, Mapping) or name not in targets:
        raise ArgumentError(f"targets must be a dict with {name!r}")
    labels: torch.Tensor = targets[name]
    return labels


def _logits(output: Any) -> torch.Tensor:
    logits: torch.Tensor = output["logits"] if isinstance(output, Mapping) else output
    return logits


def _summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross-entropies over all labels but those that are IGNORED."""
    scores = logits.float().flatten(0, -2)
    return nn.functional.cross_entropy(scores, labels.flatten(), ignore_index=IGNORED, reduction="sum")


class CausalLoss:
    """Loss of transformers' causal models."""

    def __call__(self, output: Any, targets: Any) -> Counted:
        logits, labels = _logits(output), label(targets, "labels")
        total = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=1)
        return total, (labels[..., 1:] != IGNORED).sum()


class RoutedLoss:
    """CausalLoss plus the auxiliary loss of a mixture of experts, where the model returns one.

    The tokens are counted over the whole batch. The auxiliary loss is a product of means, so it is that of each
    micro-batch, averaged: as transformers has it where gradients are accumulated.
    """

    def __init__(self, coefficient: float) -> None:
        self._coefficient = coefficient

    def prepare(self, targets: Any) -> dict[str, Any]:
        labels = label(targets, "labels")
        counted = float((labels[..., 1:] != IGNORED).sum()) / len(labels)
        return {"labels": labels, "counted": counted}

    def __call__(self, output: Any, targets: Any) -> torch.Tensor:
        total, _ = CausalLoss()(output, targets)
        loss = total / targets["counted"] / len(targets["labels"])
        return loss + self._coefficient * output["aux_loss"] if isinstance(output, Mapping) else loss


class MaskedLoss:
    """Cross-entropy of the labels that are not ignored, of every token's logits."""

    def __call__(self, output: Any, targets: Any) -> Counted:
        labels = label(targets, "labels")
        return _summed(_logits(output), labels), (labels != IGNORED).sum()


class ClassificationLoss:
    """Loss of one label, several labels or numbers for each row, as the config's ``problem_type`` says."""

    ONE = "single_label_classification"

    def __init__(self, classes: int, problem: str | None) -> None:
        self._classes = classes
        self._problem = problem

    def __call__(self, output: Any, targets: Any) -> Counted:
        logits, labels = _logits(output), label(targets, "labels")
        one = labels.dtype in (torch.long, torch.int)
        kinds = {True: self.ONE, False: "multi_label_classification"}
        problem = self._problem or ("regression" if self._classes == 1 else kinds[one])
        if problem == self.ONE:
            return _summed(logits, labels), (labels != IGNORED).sum()
        lossy = nn.functional.mse_loss if problem == "regression" else nn.functional.binary_cross_entropy_with_logits
        if self._classes == 1:
            logits, labels = logits.reshape(-1), labels.reshape(-1)
        return lossy(logits, labels, reduction="sum"), torch.tensor(labels.numel())


class PreTrainingLoss:
    """Masked language modelling plus next sentence prediction, each the mean over its labels in the whole batch.

    A micro-batch cannot know how many labels of the batch count. The driver calls ``prepare`` on the batch's
    targets, which adds that number per row. The mean over micro-batches, weighted by their shares of the
    rows, then equals the loss of the batch.
    """

    def prepare(self, targets: Any) -> dict[str, Any]:
        labels = {name: label(targets, name) for name in _PRE_TRAINING}
        counted = {name: float((rows != IGNORED).sum()) / len(rows) for name, rows in labels.items()}
        return {**labels, "counted": counted}

    def __call__(self, output: Any, targets: Any) -> torch.Tensor:
        logits = output["prediction_logits"], output["seq_relationship_logits"]
        masked, following = (
            _summed(scores, targets[name]) / targets["counted"][name]
            for scores, name in zip(logits, _PRE_TRAINING, strict=True)
        )
        return (masked + following) / len(targets["labels"])
