"""What the families share: layers from a config or from a model, checked inputs, losses."""

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

IGNORED = -100  # a label that counts nowhere, in all of transformers


class Parts:
    """Where layers come from: a model's modules, or a config, from which they are built on their workers.

    ``base`` is the family's PreTrainedModel class; it knows how weights are initialized.
    """

    def __init__(self, source: PreTrainedConfig | PreTrainedModel, base: type[PreTrainedModel]) -> None:
        self.model = source if isinstance(source, PreTrainedModel) else None
        self.config: Any = source if self.model is None else self.model.config
        self._base = base
        base(self.config)  # settles the config's attention implementation, as the unsplit model does

    def layer(
        self, path: str, cls: type[nn.Module], *args: Any, embedding: str | None = None, **kwargs: Any
    ) -> nn.Module | LayerSpec:
        """``cls(*args, **kwargs)``, or the model's module at ``path`` seen as a ``cls``.

        ``embedding``: what the layer calls the word embeddings, where the config ties them.
        """
        if self.model is None:
            tied = {"embedding": embedding} if embedding and self.config.tie_word_embeddings else None
            return LayerSpec(build, cls, self._base, self.config, args, kwargs, tied=tied)
        return view(self.model.get_submodule(path), cls)

    def lm_head(self) -> nn.Module | LayerSpec:
        """Logits of a causal model."""
        sizes = self.config.hidden_size, self.config.vocab_size
        return self.layer("lm_head", nn.Linear, *sizes, bias=False, embedding="weight")


def build(
    cls: type[nn.Module],
    base: type[PreTrainedModel],
    config: PreTrainedConfig,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> nn.Module:
    """``cls(*args, **kwargs)`` with the initial weights that ``base`` would give it."""
    module = cls(*args, **kwargs)
    with torch.no_grad():
        module.apply(base(config)._init_weights)
    return module


def view(source: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """``source`` with the forward of ``cls`` and the children that it names, or all; the very parameters."""
    seen = copy.copy(source)
    seen.__class__ = cls
    children = getattr(cls, "children_kept", None)
    seen._modules = {name: child for name, child in source._modules.items() if children is None or name in children}
    if hasattr(seen, "gradient_checkpointing"):
        seen.__dict__["gradient_checkpointing"] = False  # the pipeline's ``checkpoint`` says what is recomputed
    return seen


def take(inputs: Any, *names: str) -> list[Any]:
    """The inputs called ``names``, None where one is missing; input_ids must be there and nothing else may."""
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs or not inputs.keys() <= set(names):
        found = sorted(inputs) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise ArgumentError(f"inputs must be a dict with input_ids and at most {', '.join(names)}, not {found}")
    return [inputs.get(name) for name in names]


def positions(ids: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """``given`` position ids, or 0, 1, 2 …: (1, time)."""
    return torch.arange(ids.shape[1], device=ids.device)[None] if given is None else given


def label(targets: Any, name: str) -> torch.Tensor:
    """The targets called ``name``."""
    if not isinstance(targets, Mapping) or name not in targets:
        raise ArgumentError(f"targets must be a dict with {name!r}")
    found: torch.Tensor = targets[name]
    return found


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropies of all labels that count."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


class CausalLoss:
    """transformers' loss of causal models as (sum, count): normalised over the whole batch."""

    def __call__(self, logits: torch.Tensor, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
        labels = label(targets, "labels")
        total = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=1)
        return total, (labels[..., 1:] != IGNORED).sum()


class MaskedLoss:
    """Cross-entropy of the masked positions as (sum, count)."""

    def __call__(self, logits: torch.Tensor, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
        labels = label(targets, "labels")
        return summed(logits, labels), (labels != IGNORED).sum()
