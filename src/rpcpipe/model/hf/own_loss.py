"""Which loss a model of transformers has: that which gives what its own forward returns for labels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rpcpipe.model.hf.anatomy import Anatomy
from rpcpipe.model.hf.losses import (
    IGNORED,
    CausalLoss,
    ClassificationLoss,
    MaskedLoss,
    NoLoss,
    PreTrainingLoss,
    RoutedLoss,
)
from rpcpipe.model.hf.probes import tiny_batch
from rpcpipe.model.hf.recording import unrouted
from rpcpipe.model.hf.skeleton import Handler
from rpcpipe.model.hf.staged import outputs, skeleton_of

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # of a model or its config


def loss_of(anatomy: Anatomy) -> Any:
    """Return the loss of the model, or one that raises ArgumentError where none of those here is the model's."""
    found = _pre_training if "next_sentence_label" in _arguments(anatomy) else _labelled
    return next(
        (loss for loss, labels in found(anatomy) if _agrees(anatomy, loss, labels)), NoLoss(str(anatomy.recipe))
    )


def _arguments(anatomy: Anatomy) -> Any:
    return inspect.signature(anatomy.recipe.cls.forward).parameters


def _pre_training(anatomy: Anatomy) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    yield PreTrainingLoss(), {"labels": _of_tokens(anatomy), "next_sentence_label": torch.tensor([0, 1])}


def _labelled(anatomy: Anatomy) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """Yield losses that the model may have, each with labels of a tiny batch."""
    config = anatomy.recipe.config
    if "labels" not in _arguments(anatomy):
        return
    if anatomy.recipe.name.endswith("ForSequenceClassification"):
        loss = ClassificationLoss(config.num_labels, config.problem_type)
        rows = len(_of_tokens(anatomy))
        several = torch.ones(rows, config.num_labels) if config.num_labels > 1 else torch.ones(rows)
        yield loss, {"labels": several if config.problem_type not in (None, ClassificationLoss.ONE) else _of_rows(rows)}
        return
    model = skeleton_of(anatomy, torch.device("cpu")).model
    said = (getattr(where, name, None) for where in (model, config.get_text_config()) for name in _COEFFICIENTS)
    coefficient = next((one for one in said if one is not None), None)
    labels = {"labels": _of_tokens(anatomy)}
    yield CausalLoss() if coefficient is None else RoutedLoss(float(coefficient)), labels
    yield MaskedLoss(), labels


def _of_rows(rows: int) -> torch.Tensor:
    return torch.arange(rows) % 2


def _of_tokens(anatomy: Anatomy) -> torch.Tensor:
    """Return labels of tokens, of which some are ignored."""
    labels = tiny_batch(anatomy.recipe)["input_ids"] % 2
    labels[0, 2:4] = IGNORED
    return labels


def _agrees(anatomy: Anatomy, loss: Any, labels: dict[str, torch.Tensor]) -> bool:
    """Return whether ``loss`` of random outputs is what the model's forward returns with them."""
    try:
        output, expected = _forward(anatomy, labels)
        targets = loss.prepare(labels) if hasattr(loss, "prepare") else labels
        found = loss(output, targets)
    except Exception:
        return False  # a model that takes other labels
    value = found[0] / found[1] if isinstance(found, tuple) else found
    return bool(torch.isclose(value.float(), expected.float(), rtol=1e-4, atol=1e-5))


def _forward(anatomy: Anatomy, labels: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """Return outputs of the model on a tiny batch, whose last module gives random values, and its own loss of them."""
    skeleton = skeleton_of(anatomy, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def scores(value: torch.Tensor) -> torch.Tensor:
        return torch.randn(value.shape, generator=generator)

    def behind(path: str) -> Handler:
        part = skeleton.hollow(path)
        last = path == anatomy.tail[-1]

        def module(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = part(*args, **kwargs)
            return pytree.tree_map_only(torch.Tensor, scores, result) if last else result

        return module

    handlers = {**anatomy.body.passing(), **{path: behind(path) for path in anatomy.tail}}
    unrouted(skeleton.model)
    try:
        with torch.no_grad():
            result = skeleton.run(handlers, False, **tiny_batch(anatomy.recipe), **labels)
    finally:
        if anatomy.records:
            skeleton.model.config.get_text_config().output_router_logits = True
    return outputs(result), result["loss"]
