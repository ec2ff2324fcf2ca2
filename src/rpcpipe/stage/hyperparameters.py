"""What an optimizer has beside its parameters and their state.

That is the entries of its ``param_groups``, options and what some optimizers count, and what optimizers of one's own
count in attributes (``self.t``) or under string keys of ``state``. The latter are carried in every group, as entries
whose names begin with "optimizer.".
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

Groups = list[dict[str, Any]]

_PARAMETERS = ("params", "param_names")
_IMMUTABLE = (bool, int, float, str, type(None))


def hyperparameters(optimizer: torch.optim.Optimizer) -> Groups:
    """Return the optimizer's ``param_groups`` without the parameters and their names."""
    return [{key: value for key, value in group.items() if key not in _PARAMETERS} for group in optimizer.param_groups]


@functools.cache
def _attributes_of_torch() -> set[str]:
    """Return the attributes of torch's optimizers; not at import, as making the first one imports torch._dynamo."""
    plain = torch.optim.SGD([torch.nn.Parameter(torch.empty(0))], lr=0.1)
    return {*vars(plain), "_need_device_dtype_check_for_fused", "_opt_called", "_step_count"}


_OWN, _STATE = "optimizer.", "optimizer.state."


def is_own(key: str) -> bool:
    """Return whether ``key`` names an attribute or a string key of the optimizer's state, and no option of a group."""
    return key.startswith(_OWN)


def options(groups: Sequence[Mapping[str, Any]]) -> Groups:
    """Return ``groups`` without what is not in ``param_groups``."""
    return [{key: value for key, value in group.items() if not is_own(key)} for group in groups]


def own(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the plain values and tensors in the optimizer's attributes and under string keys of its state."""
    attributes = {
        f"{_OWN}{name}": value
        for name, value in vars(optimizer).items()
        if name not in _attributes_of_torch() and _is_plain(value)
    }
    state = {
        f"{_STATE}{key}": value for key, value in optimizer.state.items() if isinstance(key, str) and _is_plain(value)
    }
    return attributes | state


def takes(optimizer: torch.optim.Optimizer, key: Any) -> bool:
    """Return whether ``key`` may name an entry of the optimizer's: no parameters, and no attribute that torch uses.

    Some options and attributes appear with the first update that needs them.
    """
    if not isinstance(key, str) or key in _PARAMETERS:
        return False
    if not is_own(key) or key.startswith(_STATE):
        return True
    name = key.removeprefix(_OWN)
    return name not in _attributes_of_torch() and all(
        _is_plain(getattr(at, name, 0)) for at in (optimizer, type(optimizer))
    )


def _is_plain(value: Any) -> bool:
    """Return whether ``value`` is made of plain values and of tensors that are no parameters."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, _IMMUTABLE) for key in value) and all(map(_is_plain, value.values()))
    return isinstance(value, _IMMUTABLE) or (isinstance(value, torch.Tensor) and not value.requires_grad)


def entries(optimizer: torch.optim.Optimizer) -> Groups:
    """Return the ``hyperparameters``, with what is the optimizer's ``own`` in every group."""
    mine = own(optimizer)
    return [group | mine for group in hyperparameters(optimizer)]


def _set(optimizer: torch.optim.Optimizer, group: dict[str, Any], key: str, value: Any) -> None:
    if key.startswith(_STATE):
        optimizer.state[key.removeprefix(_STATE)] = value  # type: ignore[index]
    elif is_own(key):
        setattr(optimizer, key.removeprefix(_OWN), value)
    else:
        group[key] = value


def _drop(optimizer: torch.optim.Optimizer, keys: Iterable[str]) -> None:
    for key in keys:
        if key.startswith(_STATE):
            del optimizer.state[key.removeprefix(_STATE)]  # type: ignore[arg-type]
        else:
            delattr(optimizer, key.removeprefix(_OWN))


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
    """Give the optimizer the entries of ``groups``, and no others beside its parameters and their state."""
    for group, values in zip(optimizer.param_groups, copied(groups), strict=True):
        for key in group.keys() - values.keys() - set(_PARAMETERS):
            del group[key]
        _drop(optimizer, own(optimizer).keys() - values.keys())
        for key, value in values.items():
            _set(optimizer, group, key, value)


def update(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Set the entries of ``groups``; a tensor goes to the device of the one that it replaces."""
    for group, values in zip(optimizer.param_groups, copied(groups), strict=True):
        for key, value in values.items():
            old = group.get(key)
            if isinstance(value, torch.Tensor) and isinstance(old, torch.Tensor):
                value = value.to(old.device)
            _set(optimizer, group, key, value)


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
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other or (one != one and other != other))
