"""Tied weights: one weight that several layers share, on the same or on different workers.

Layers on one worker share the parameter itself. Each worker has one copy, with the same initial value. The
gradients of the copies are summed before the update, and applying the same update keeps the copies
identical to the bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from rpcpipe.errors import CheckpointError, ModelError
from rpcpipe.model import rng
from rpcpipe.model.names import full_name


class Holder(NamedTuple):
    """A layer that shares a weight, and the parameter's name within the layer."""

    layer: str
    parameter: str

    @property
    def name(self) -> str:
        """Name of the parameter in the unsplit model."""
        return full_name(self.layer, self.parameter)


class Spec(Protocol):
    """The part of a LayerSpec used here; ``tied`` maps the key that layers share to a parameter's name."""

    @property
    def tied(self) -> Mapping[str, str]: ...

    def build(self) -> nn.Module: ...


@dataclass(frozen=True)
class Tie:
    """One tied weight and its ``holders``, in the model's order.

    ``spec`` is the first holder's LayerSpec, or None if that layer is a module; ``index`` is the layer's index.
    """

    holders: tuple[Holder, ...]
    spec: Spec | None
    index: int

    @property
    def group(self) -> str:
        """Name of the tied weight in messages between workers."""
        return f"the weight {self.holders[0].name}"


def find(layers: Mapping[str, nn.Module | Spec]) -> tuple[Tie, ...]:
    """Return the weights tied by specs' keys, and the parameters that several modules share.

    Raises ModelError for a key that only one layer has.
    """
    holders_of: dict[str | nn.Parameter, list[tuple[int, Holder]]] = {}
    specs = dict[int, Spec]()
    for index, (name, layer) in enumerate(layers.items()):
        if isinstance(layer, nn.Module):
            for path, parameter in layer.named_parameters():
                holders_of.setdefault(parameter, []).append((index, Holder(name, path)))
        else:
            specs[index] = layer
            for key, path in layer.tied.items():
                holders_of.setdefault(key, []).append((index, Holder(name, path)))
    for shared, holders in holders_of.items():
        if isinstance(shared, str) and len(holders) == 1:
            alone = holders[0][1].layer
            raise ModelError(f"tied={shared!r} is said of layer {alone} alone; say it of another one too")
    return tuple(
        Tie(tuple(holder for _, holder in holders), specs.get(holders[0][0]), holders[0][0])
        for holders in holders_of.values()
        if len(holders) > 1
    )


def join(
    modules: Mapping[str, nn.Module], ties: Sequence[Tie], drawn: Collection[str], seed: int
) -> dict[str, nn.Parameter]:
    """Make tied layers among ``modules`` share one parameter; return the parameters, by group.

    The modules named in ``drawn`` were just built from specs. Where a weight's first holder is on another
    worker, the shared parameter takes the initial value that the first holder's spec gives. Raises
    ModelError where shapes, dtypes or ``requires_grad`` differ.
    """
    weights = {}
    for tie in ties:
        here = [holder for holder in tie.holders if holder.layer in modules]
        if not here:
            continue
        weight = _parameter(modules[here[0].layer], here[0])
        if here[0] != tie.holders[0] and here[0].layer in drawn and tie.spec is not None:
            rng.seed_init(seed, tie.index)
            original = _parameter(tie.spec.build(), tie.holders[0])
            _check_alike(tie.holders[0], original, here[0], weight)
            weight.data.copy_(original.data)
        for holder in here[1:]:
            own = _parameter(modules[holder.layer], holder)
            _check_alike(here[0], weight, holder, own)
            _replace(modules[holder.layer], own, weight)
        weights[tie.group] = weight
    return weights


def _parameter(module: nn.Module, holder: Holder) -> nn.Parameter:
    try:
        return module.get_parameter(holder.parameter)
    except AttributeError as error:
        raise ModelError(
            f"layer {holder.layer}, a {type(module).__name__}, has no parameter {holder.parameter!r} to tie; say which"
            ' by tied={"key": "name of the parameter in the layer"}'
        ) from error


def _check_alike(first: Holder, a: nn.Parameter, second: Holder, b: nn.Parameter) -> None:
    if (a.shape, a.dtype, a.requires_grad) != (b.shape, b.dtype, b.requires_grad):
        raise ModelError(f"{first.name} and {second.name} cannot be one weight: {_describe(a)} and {_describe(b)}")


def _describe(parameter: nn.Parameter) -> str:
    return f"{tuple(parameter.shape)} of {parameter.dtype}{'' if parameter.requires_grad else ', frozen'}"


def _replace(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for submodule in module.modules():
        for name, parameter in submodule.named_parameters(recurse=False, remove_duplicate=False):
            if parameter is old:
                setattr(submodule, name, new)


def completed(ties: Sequence[Tie], state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return ``state`` with each tied weight that it contains under all of the weight's names.

    Raises CheckpointError where two names have different values.
    """
    complete = dict(state)
    for tie in ties:
        names = [holder.name for holder in tie.holders]
        present = [name for name in names if name in state]
        for other in present[1:]:
            if not torch.equal(state[present[0]], state[other]):
                raise CheckpointError(
                    f"{present[0]} and {other} are one weight of the model and differ in the state; give one of them"
                )
        complete |= {name: state[present[0]] for name in names if present}
    return complete
