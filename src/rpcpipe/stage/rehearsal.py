"""Whether an optimizer could go on from saved options and state, found out before it takes them.

A checkpoint may be whole and hold what no optimizer of its class has: another's options, a moment of another shape. The
saved values are compared with what a twin of the optimizer makes on stand-ins of a few elements, and a twin updates
from them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import CheckpointError
from rpcpipe.stage import twin
from rpcpipe.stage.hyperparameters import Groups, entries, takes, update
from rpcpipe.stage.likeness import unlike

States = Mapping[nn.Parameter, dict[str, Any]]


def check(optimizer: torch.optim.Optimizer, groups: Groups, states: States, names: Mapping[nn.Parameter, str]) -> None:
    """Raise CheckpointError unless ``optimizer`` could go on from ``groups`` and ``states``; it stays as it is.

    ``groups``: the saved entries by group. ``names``: of the parameters, for messages. An optimizer that cannot be
    copied, or cannot update stand-ins as it is now, is only compared by the entries.
    """
    for index, (live, saved) in enumerate(zip(entries(optimizer), groups, strict=True)):
        _check_entries(optimizer, index, live, saved)
    with twin.trial():
        small = {parameter: twin.stand_in(parameter) for parameter in states}
        try:
            _updated(optimizer, [{}] * len(groups), small, {})
        except Exception:
            return
        fresh = _attempt("the saved options of the groups", optimizer, groups, small, {})
        for parameter, state in states.items():
            _check_state(names[parameter], parameter, small[parameter], fresh[parameter], state, optimizer, groups)
        shrunk = {parameter: _shrunk(parameter, state) for parameter, state in states.items()}
        _attempt("the saved state of the parameters", optimizer, groups, small, shrunk)


def _check_entries(
    optimizer: torch.optim.Optimizer, index: int, live: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    for key, value in saved.items():
        how = unlike(live.get(key), value) if takes(optimizer, key) else "is no option of a group"
        if key == "differentiable" and value and not live.get(key):
            how = f"is {value!r:.60}, and a pipeline cannot differentiate its updates"
        if how:
            raise CheckpointError(f"option {key!r} of group {index} of the optimizer {how}")


def _check_state(
    name: str,
    parameter: nn.Parameter,
    small: nn.Parameter,
    fresh: Mapping[str, Any],
    saved: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    groups: Groups,
) -> None:
    """Raise CheckpointError if a value of a parameter's ``saved`` state is of another kind than after an update.

    ``fresh``: the state of ``small``, its stand-in, after one.
    """
    if saved and _complaint(_grown(fresh, small, parameter), saved):
        # A shape that only looked like the stand-in's; an update of the whole parameter tells.
        whole = nn.Parameter(torch.full(parameter.shape, 0.5, dtype=parameter.dtype))
        expected = _updated(optimizer, groups, {parameter: whole}, {})[parameter]
        if how := _complaint(expected, saved):
            raise CheckpointError(f"the optimizer's state of {name!r} is not of its kind: {how}")


def _complaint(expected: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """Return the first of the ``expected`` values that is of another kind in ``saved``; None says nothing there."""
    pairs = ((key, unlike(value, saved[key])) for key, value in expected.items() if saved.get(key) is not None)
    return next((f"{key!r} {how}" for key, how in pairs if how), "")


def _grown(state: Mapping[str, Any], small: torch.Tensor, whole: torch.Tensor) -> dict[str, Any]:
    """Return ``state`` with the tensors that have the shape of ``small`` replaced by some of the shape of ``whole``."""
    return {
        key: value.new_empty(()).expand(whole.shape)
        if isinstance(value, torch.Tensor) and value.dim() and value.shape == small.shape
        else value
        for key, value in state.items()
    }


def _shrunk(parameter: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` for a stand-in of ``parameter``; nothing if a tensor is neither of its shape nor a scalar."""
    part = tuple(slice(0, 2) for _ in parameter.shape)
    tensors = {key: value.cpu() for key, value in state.items() if isinstance(value, torch.Tensor)}
    if any(value.dim() and value.shape != parameter.shape for value in tensors.values()):
        return {}
    return {**state, **{key: value[part] if value.dim() else value for key, value in tensors.items()}}


def _attempt(
    what: str,
    optimizer: torch.optim.Optimizer,
    groups: Groups,
    small: Mapping[nn.Parameter, nn.Parameter],
    state: States,
) -> dict[nn.Parameter, dict[str, Any]]:
    """Return what ``_updated`` does; raises CheckpointError with ``what`` the optimizer does not take."""
    try:
        return _updated(optimizer, groups, small, state)
    except Exception as error:
        raise CheckpointError(
            f"{type(optimizer).__name__} cannot go on from {what}: {type(error).__name__}: {error}"
        ) from error


def _updated(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Mapping[str, Any]],
    stand_ins: Mapping[nn.Parameter, nn.Parameter],
    states: States,
) -> dict[nn.Parameter, dict[str, Any]]:
    """Return by parameter the state of its stand-in after an update, in groups with the entries ``groups``."""
    made = twin.twin(optimizer, stand_ins)
    update(made, groups)
    for parameter, small in stand_ins.items():
        small.grad = torch.full_like(small, 0.01)
        if states.get(parameter):
            made.state[small] = copy.deepcopy(states[parameter])
    twin.step(made)
    return {parameter: dict(made.state.get(small, {})) for parameter, small in stand_ins.items()}
