"""Code shared by the model families: layers from a config or a model, input checks, losses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from rpcpipe.errors import ArgumentError
from rpcpipe.model.layers import LayerSpec

IGNORED = -100  # the label that all losses of transformers ignore


class Parts:
    """Source of a pipeline's layers: a model's modules, or a config from which workers build them.

    ``base`` is the family's PreTrainedModel class, which initializes the weights.
    """

    def __init__(self, source: PreTrainedConfig | PreTrainedModel, base: type[PreTrainedModel]) -> None:
        self.model = source if isinstance(source, PreTrainedModel) else None
        self.config: Any = source if self.model is None else self.model.config
        self._base = base
        base(self.config)  # sets the config's attention implementation, as the unsplit model does

    def layer(
        self, path: str, cls: type[nn.Module], *args: Any, embedding: str | None = None, **kwargs: Any
    ) -> nn.Module | LayerSpec:
        """Return a LayerSpec of ``cls(*args, **kwargs)``, or a view of the model's module at ``path`` as a ``cls``.

        ``embedding`` names the layer's parameter that is tied to the word embeddings if the config ties them.
        """
        if self.model is None:
            tied = {"embedding": embedding} if embedding and self.config.tie_word_embeddings else None
            return LayerSpec(build, cls, self._base, self.config, args, kwargs, tied=tied)
        return view(self.model.get_submodule(path), cls)

    def lm_head(self) -> nn.Module | LayerSpec:
        """Return the layer that computes the logits of a causal model."""
        sizes = self.config.hidden_size, self.config.vocab_size
        return self.layer("lm_head", nn.Linear, *sizes, bias=False, embedding="weight")


def build(
    cls: type[nn.Module],
    base: type[PreTrainedModel],
    config: PreTrainedConfig,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> nn.Module:
    """Return ``cls(*args, **kwargs)`` with its weights initialized as ``base`` does."""
    module = cls(*args, **kwargs)
    with torch.no_grad():
        module.apply(base(config)._init_weights)
    return module


def view(source: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Return a module with ``source``'s parameters, the forward of ``cls``, and the children that ``cls`` keeps.

    ``cls.children_kept`` names these children; without it all children are kept.
    """
    viewed = copy.copy(source)
    viewed.__class__ = cls
    children = getattr(cls, "children_kept", None)
    viewed._modules = {name: child for name, child in source._modules.items() if children is None or name in children}
    if hasattr(viewed, "gradient_checkpointing"):
        viewed.__dict__["gradient_checkpointing"] = False  # the pipeline's ``checkpoint`` decides on recomputation
    return viewed


def take(inputs: Any, *names: str) -> list[Any]:
    """Return the inputs called ``names``, with None for a missing one.

    Raises ArgumentError if ``inputs`` is no dict, lacks input_ids, or has a key that is not in ``names``.
    """
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs or not inputs.keys() <= set(names):
        actual = sorted(inputs) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise ArgumentError(f"inputs must be a dict with input_ids and at most {', '.join(names)}, not {actual}")
    return [inputs.get(name) for name in names]


def positions(ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Return ``position_ids``, or 0, 1, 2, … of shape (1, time) if they are None."""
    return torch.arange(ids.shape[1], device=ids.device)[None] if position_ids is None else position_ids


def label(targets: Any, name: str) -> torch.Tensor:
    """Return the targets called ``name``; raises ArgumentError if there are none."""
    if not isinstance(targets, Mapping) or name not in targets:
        raise ArgumentError(f"targets must be a dict with {name!r}")
    labels: torch.Tensor = targets[name]
    return labels


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross-entropies over all labels but those that are IGNORED."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


class CausalLoss:
    """Loss of transformers' causal models as (sum, count), so that it is normalised over the whole batch."""

    def __call__(self, logits: torch.Tensor, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
        labels = label(targets, "labels")
        total = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=1)
        return total, (labels[..., 1:] != IGNORED).sum()


class MaskedLoss:
    """Cross-entropy of the masked positions as (sum, count)."""

    def __call__(self, logits: torch.Tensor, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
        labels = label(targets, "labels")
        return summed(logits, labels), (labels != IGNORED).sum()
