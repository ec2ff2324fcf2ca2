"""The entries of an optimizer's ``param_groups`` beside the parameters: options, and what some optimizers count."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Groups = list[dict[str, Any]]

_PARAMETERS = ("params", "param_names")
_IMMUTABLE = (bool, int, float, str, type(None))


def hyperparameters(optimizer: torch.optim.Optimizer) -> Groups:
    """Return the optimizer's ``param_groups`` without the parameters and their names."""
    return [{key: value for key, value in group.items() if key not in _PARAMETERS} for group in optimizer.param_groups]


def copied(groups: Sequence[Mapping[str, Any]]) -> Groups:
    """Return a copy of ``groups`` that shares no tensor or container with it."""
    return [
        {key: value if _is_immutable(value) else copy.deepcopy(value) for key, value in group.items()}
        for group in groups
    ]  # fmt: skip


def _is_immutable(value: Any) -> bool:
    return isinstance(value, _IMMUTABLE) or (
        isinstance(value, tuple) and all(isinstance(item, _IMMUTABLE) for item in value)
    )


def replace(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Give the optimizer's groups the entries of ``groups``, and no others beside their parameters."""
    for group, entries in zip(optimizer.param_groups, copied(groups), strict=True):
        for key in group.keys() - entries.keys() - set(_PARAMETERS):
            del group[key]
        group.update(entries)


def update(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Set the entries of ``groups``; a tensor goes to the device of the one that it replaces."""
    for group, entries in zip(optimizer.param_groups, copied(groups), strict=True):
        for key, value in entries.items():
            old = group.get(key)
            if isinstance(value, torch.Tensor) and isinstance(old, torch.Tensor):
                value = value.to(old.device)
            group[key] = value


def changed(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Groups:
    """Return, by group, copies of the entries of ``after`` that are not those of ``before``."""
    return copied([
        {key: value for key, value in now.items() if key not in then or not same(then[key], value)}
        for then, now in zip(before, after, strict=True)
    ])  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Return whether two entries have equal values, also if they are tensors or contain tensors."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return (
            isinstance(one, torch.Tensor)
            and isinstance(other, torch.Tensor)
            and torch.equal(one.detach().cpu(), other.detach().cpu())
        )
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (one != one and other != other))
