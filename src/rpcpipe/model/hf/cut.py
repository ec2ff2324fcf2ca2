"""Cut a model of transformers, or the model that a config describes, into named layers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
)

from rpcpipe.errors import ArgumentError, ModelError
from rpcpipe.model.hf.adapters import unwrapped
from rpcpipe.model.hf.anatomy import Anatomy, part_of
from rpcpipe.model.hf.examination import anatomy_of
from rpcpipe.model.hf.folder import Folder, Weights
from rpcpipe.model.hf.own_loss import loss_of
from rpcpipe.model.hf.recipe import Recipe
from rpcpipe.model.hf.skeleton import Skeleton, skeleton
from rpcpipe.model.hf.staged import INPUTS, Block, Embedding, Idle, Tail, on_stage
from rpcpipe.model.language_model import LanguageModel
from rpcpipe.model.layers import Layer, LayerSpec, Loss, Wired


def cut(source: Any) -> tuple[dict[str, Layer], Loss, LanguageModel]:
    """Return the layers of ``source``, its loss, and how it generates.

    ``source``: a config, a model, a model of peft, or a saved Folder. Raises ArgumentError for another object,
    ModelError for a model that is no chain of blocks, and CheckpointError for a folder that holds another model.
    """
    source, prefix = unwrapped(source)
    model = source if isinstance(source, PreTrainedModel) else None
    config = source if model is None and not isinstance(source, Folder) else source.config
    anatomy = _anatomy(class_of(config if model is None else model), config, getattr(source, "dtype", None))
    if model is not None:
        anatomy = _as_it_is(model, anatomy)
    parts = _parts(anatomy)
    if model is not None:
        made: dict[str, Any] = {path: view(model, anatomy, path, part) for path, part in parts.items()}
    else:
        ties = _ties(anatomy, list(parts))
        weights = source.weights(anatomy, list(parts)) if isinstance(source, Folder) else {}
        made = {
            path: LayerSpec(build, anatomy, path, part, weights.get(path), tied=ties.get(path) or None)
            for path, part in parts.items()
        }
    language_model = LanguageModel(
        cached=bool(anatomy.cache), takes_positions="position_ids" in anatomy.inputs, causal=anatomy.causal
    )
    layers = {prefix + path: _wired(layer, parts[path]) for path, layer in made.items()}
    return layers, loss_of(anatomy), language_model


def _anatomy(cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: Any) -> Anatomy:
    """Return the anatomy of a model of ``dtype``, if it is one; it was examined in torch's default dtype."""
    anatomy = anatomy_of(Recipe.of(cls, config))
    return replace(anatomy, recipe=Recipe.of(cls, config, dtype)) if isinstance(dtype, torch.dtype) else anatomy


def class_of(source: Any) -> type[PreTrainedModel]:
    """Return the class of the model, or the one that the config's ``architectures`` or its type means."""
    if isinstance(source, PreTrainedModel):
        return type(source)
    if not isinstance(source, PreTrainedConfig):
        raise ArgumentError(
            f"from_transformers takes a model or a config of transformers, not a {type(source).__name__}; any other"
            " model is a pipeline once it is written as a list of layers (docs/guide/models.md)"
        )
    named = [getattr(transformers, name, None) for name in source.architectures or ()]
    mapped = [
        mapping[type(source)]
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_PRETRAINING_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
        if type(source) in mapping
    ]
    if source.model_type == "bert" and not named:
        named = [transformers.BertForPreTraining]
    found = next((one for one in (*named, *mapped) if one is not None), None)
    if found is None:
        raise ArgumentError(f"the config's architectures name no model of transformers for a {type(source).__name__}")
    return found


Part = Embedding | Block | Tail | Idle


def _parts(anatomy: Anatomy) -> dict[str, Part]:
    """Return the parts by their paths, in the order of the layers."""
    blocks = {path: Block(anatomy, index) for index, path in enumerate(anatomy.body.blocks)}
    tail = {path: Tail(anatomy, index) for index, path in enumerate(anatomy.tail)}
    return {anatomy.embedding: Embedding(anatomy), **dict.fromkeys(anatomy.idle, Idle()), **blocks, **tail}


def _wired(layer: Any, part: Part) -> Layer:
    match part:
        case Embedding(anatomy):
            return Wired(layer, gives=(INPUTS, *map(_value, anatomy.values)))
        case Block():
            return Wired(layer, takes=(INPUTS, *map(_value, part.values)))
        case Tail(anatomy, index):
            last = index == len(anatomy.tail) - 1
            return Wired(layer, takes=(INPUTS, "input_ids") if last and anatomy.tail_sees_ids else INPUTS)
        case Idle():
            return layer


def _value(number: int) -> str:
    """Return the name of a value that goes along from the part before the blocks."""
    return f"{INPUTS}.{number}"


def _pruned(module: nn.Module, anatomy: Anatomy, path: str) -> nn.Module:
    """Drop the submodules of ``module``, a copy, that are not of the embedding, if it is this."""
    return _only(module, anatomy.children) if path == anatomy.embedding and anatomy.children else module


def _only(module: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Return ``module``, a copy, with the submodules ``paths`` alone."""
    kept: dict[str, nn.Module] = {}
    for name, inner in itertools.groupby(paths, lambda path: path.partition(".")[0]):
        below = [path.partition(".")[2] for path in inner]
        child = module.get_submodule(name)
        kept[name] = child if below == [""] else _only(copy.copy(child), below)
    vars(module)["_modules"] = kept
    return module


def view(model: PreTrainedModel, anatomy: Anatomy, path: str, part: Part) -> nn.Module:
    """Return the model's module at ``path`` as a layer; the module itself stays as it is."""
    return _pruned(on_stage(model.get_submodule(path), part), anatomy, path)


def build(anatomy: Anatomy, path: str, part: Part, weights: Weights | None = None) -> nn.Module:
    """Return the layer at ``path`` with initial weights, or those that were saved."""
    frame = _frame(anatomy)
    module = _pruned(frame.part(path), anatomy, path)
    if weights is None:
        frame.initialize(module)
    else:
        weights.fill(module, path, frame)
    return on_stage(module, part)


def _frame(anatomy: Anatomy) -> Skeleton:
    return skeleton(anatomy.recipe, anatomy.stand_ins, torch.device("cpu"))


def _ties(anatomy: Anatomy, paths: list[str]) -> dict[str, dict[str, str]]:
    """Return for every layer the parameters that it shares with others, by a key for each."""
    holders: dict[int, list[tuple[str, str]]] = {}
    model = anatomy.recipe.weightless()
    for full, parameter in model.named_parameters(remove_duplicate=False):
        path = part_of(full, paths)
        holders.setdefault(id(parameter), []).append((path, full.removeprefix(f"{path}.")))
    ties: dict[str, dict[str, str]] = {}
    for shared in holders.values():
        by_layer = dict(reversed(shared))  # the first of a layer's own names
        if len(by_layer) > 1:
            key = ".".join(shared[0])
            for path, name in by_layer.items():
                ties.setdefault(path, {})[key] = name
    return ties


def _as_it_is(model: PreTrainedModel, anatomy: Anatomy) -> Anatomy:
    """Return the anatomy with the dtype to which the model's buffers outside of the layers have been converted.

    Raises ModelError if modules there differ otherwise from those that the model's config describes.
    """
    frame = dict(_frame(anatomy).model.named_modules())
    taken = tuple(f"{path}." for path in _parts(anatomy) if path != anatomy.embedding or not anatomy.children)
    for path, theirs in model.named_modules():
        if f"{path}.".startswith(taken) or path not in frame:
            continue
        ours = frame[path]
        if any(True for _ in theirs.children()) or any(True for _ in theirs.parameters(recurse=False)):
            continue
        found = dict(ours.named_buffers())
        changed = [name for name, value in theirs.named_buffers() if not _same(found.get(name), value)]
        if changed and anatomy.recipe.rounded is None and theirs.get_buffer(changed[0]).is_floating_point():
            dtype = theirs.get_buffer(changed[0]).dtype
            return _as_it_is(model, replace(anatomy, recipe=anatomy.recipe.with_buffers_in(dtype)))
        if changed or type(ours) is not type(theirs) or theirs.extra_repr() != ours.extra_repr():
            raise ModelError(
                f"{path} of the {type(model).__name__} was changed after its config built it; say the change in the"
                " config, from which stages make what is between the layers"
            )
    return anatomy


def _same(ours: torch.Tensor | None, theirs: torch.Tensor) -> bool:
    return ours is not None and ours.dtype == theirs.dtype and torch.equal(ours, theirs.cpu())
