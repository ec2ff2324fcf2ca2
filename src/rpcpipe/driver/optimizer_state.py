"""The state of the workers' optimizers as one ``state_dict`` of torch's format, gathered and loaded.

Parameters have the numbers that torch gives those of an optimizer over the unsplit model's trainable parameters: by
group, and in a group by the model's order; ``param_names`` says which they are. A tied weight counts once, by its first
name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from rpcpipe.driver.deployment import Deployment
from rpcpipe.driver.driver import Driver
from rpcpipe.errors import CheckpointError, require
from rpcpipe.model.sendable import as_argument, checked
from rpcpipe.stage.hyperparameters import Groups, is_own, same
from rpcpipe.worker.messages import OptimizerPart
from rpcpipe.worker.operations import GetOptimizer, LoadOptimizer

_PARAMETERS = ("params", "param_names")


def merged(rows: Iterable[Sequence[tuple[Mapping[str, Any], bool]]], changes: Sequence[Mapping[str, Any]]) -> Groups:
    """Return the hyperparameters of the next step by parameter group; ``rows``: by group, each worker's, and if used.

    These are ``changes``, set on the driver since the last update, and otherwise the values that all workers have in
    common. A value that the factory makes different on each worker is left out: the factory makes it again.
    """
    return [_common(row) | dict(own) for row, own in zip(rows, changes, strict=True)]


def _common(row: Sequence[tuple[Mapping[str, Any], bool]]) -> dict[str, Any]:
    """Return what the workers' versions of one group have in common, of those with a parameter in it if there are any.

    An optimizer may count in its groups, and not in one without parameters.
    """
    first, *others = [group for group, used in row if used] or [group for group, _ in row]
    return {
        key: value
        for key, value in first.items()
        if all(key in other and same(value, other[key]) for other in others)
    }  # fmt: skip


class _Whole(NamedTuple):
    """The parts of all workers, by worker, and of the whole model: by group, its parameters' shapes by name."""

    parts: Mapping[str, OptimizerPart]
    members: list[dict[str, tuple[int, ...]]]

    @classmethod
    def of(cls, driver: Driver, deployment: Deployment, *, with_state: bool) -> _Whole:
        names = deployment.layout.names if deployment.shard else deployment.layout.pipeline_of(0)
        asked = names if with_state else deployment.layout.names
        parts: dict[str, OptimizerPart] = driver.collect(
            {name: driver.call(name, GetOptimizer(with_state)) for name in asked}
        )
        count = max(len(part.groups) for part in parts.values())
        members: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
        first = {tie.holders[0].name for tie in deployment.ties}
        later = {holder.name for tie in deployment.ties for holder in tie.holders[1:]} - first
        for stage in sorted({stage for part in parts.values() for stage in part.members}):
            rows = [part.members[stage] for part in parts.values() if stage in part.members]
            for name, (shape, _) in rows[0].items():
                group = next((row[name][1] for row in rows if row[name][1] is not None), None)
                if group is not None and name not in later:
                    members[group][name] = shape
        return cls(parts, members)


def gather(driver: Driver, deployment: Deployment, changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the ``state_dict``; ``changes``: by group, the hyperparameters set on the driver."""
    whole = _Whole.of(driver, deployment, with_state=True)
    names = [name for group in whole.members for name in group]
    states = {name: state for part in whole.parts.values() for name, state in part.states.items()}
    rows = zip(*(zip(part.groups, part.used, strict=True) for part in whole.parts.values() if part.groups), strict=True)
    start, groups = 0, []
    for entries, members in zip(merged(rows, changes), whole.members, strict=True):
        numbers = list(range(start, start + len(members)))
        groups.append({**entries, "params": numbers, "param_names": list(members)})
        start += len(members)
    return {
        "state": {number: states[name] for number, name in enumerate(names) if states.get(name)},
        "param_groups": groups,
    }


def load(driver: Driver, deployment: Deployment, state_dict: Any) -> Groups:
    """Give all workers their parts of a ``state_dict``; return the groups' hyperparameters.

    Raises CheckpointError, before anything changes, for one of another model or optimizer.
    """
    whole = _Whole.of(driver, deployment, with_state=False)
    groups, states = _checked(state_dict, whole)
    first = {holder.name: tie.holders[0].name for tie in deployment.ties for holder in tie.holders}
    replies = {}
    for worker, part in whole.parts.items():
        own = [name for members in part.members.values() for name, (_, group) in members.items() if group is not None]
        mine = {name: states.get(first.get(name, name), {}) for name in own}
        replies[worker] = driver.call(worker, LoadOptimizer(groups, mine))
    driver.collect(replies)
    return groups


def _checked(given: Any, whole: _Whole) -> tuple[Groups, dict[str, dict[str, Any]]]:
    """Return the groups and, by parameter's name, the state of a ``state_dict`` that fits."""
    try:
        saved, state = list(given["param_groups"]), dict(given["state"])
        groups = [{key: value for key, value in group.items() if key not in _PARAMETERS} for group in saved]
        numbers = [list(map(int, group["params"])) for group in saved]
        names_of = [
            list(map(str, group.get("param_names") or members))
            for group, members in zip(saved, whole.members, strict=False)
        ]
    except Exception as error:  # whatever a strange object raises
        raise CheckpointError(
            f"pipe.optimizer.load_state_dict takes what state_dict() of it, or of torch's optimizer over the unsplit"
            f" model's trainable parameters, returned, not {given!r:.80} ({type(error).__name__}: {error})"
        ) from error
    sizes, own_sizes = [len(row) for row in numbers], [len(group) for group in whole.members]
    _require(sizes == own_sizes, f"has groups of {sizes} parameters, and this pipeline's optimizer of {own_sizes}")
    entries = next(part.groups for part in whole.parts.values() if part.groups)
    for index, (group, own) in enumerate(zip(groups, entries, strict=True)):
        missing = [key for key in own if key not in group and not is_own(key)]
        _require(not missing, f"lacks {missing} in group {index}: it is another optimizer's")
    found: dict[str, dict[str, Any]] = {}
    for names, row, members in zip(names_of, numbers, whole.members, strict=True):
        _require(set(names) == members.keys(), f"is of other parameters: {sorted(set(names) ^ members.keys())[:5]}")
        for name, number in zip(names, row, strict=True):
            found[name] = _fitting(name, state.get(number, {}), members[name])
    with as_argument(CheckpointError):
        return checked(groups, "a group of the optimizer's state_dict", torch.Tensor.cpu), found


def _fitting(name: str, state: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return one parameter's state as it is sent; a tensor of as many dimensions has its size, or 1, in each."""
    if not isinstance(state, Mapping):
        _require(False, f"has {state!r:.80} as the state of {name}")
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() == len(shape):
            fits = all(size in (1, own) for size, own in zip(value.shape, shape, strict=True))
            _require(fits, f"has {key} of shape {tuple(value.shape)} for {name}, which has {shape}")
    with as_argument(CheckpointError):
        found: dict[str, Any] = checked(dict(state), f"the optimizer's state of {name}", torch.Tensor.cpu)
    return found


def _require(condition: bool, what: str) -> None:
    require(condition, f"the optimizer's state_dict {what}; nothing has changed", error=CheckpointError)
