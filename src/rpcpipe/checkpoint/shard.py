"""One worker's part of a checkpoint: that worker writes it, and any worker may read it.

Reading has two phases, so that no worker changes its state before all workers have read what they need.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpcpipe.checkpoint import tensor_file
from rpcpipe.checkpoint.manifest import Manifest
from rpcpipe.checkpoint.plain_state import decode, encode
from rpcpipe.checkpoint.tensor_file import Reader, Stored
from rpcpipe.errors import CheckpointError
from rpcpipe.model.extra_state import is_extra
from rpcpipe.model.microbatch import map_tensors
from rpcpipe.stage.optimizer import LocalOptimizer

# The most names that an error message shows.
_SHOWN = 5


@dataclass(kw_only=True)
class Written:
    """The record of what a worker has written.

    ``sizes``: the bytes of each file. ``weight_bytes``: the bytes of the weights' tensors. ``state``, ``shared``,
    ``loss``, ``optimizer`` and ``groups`` are as in ``Manifest``, for this worker's parameters.
    ``used``: by group of the optimizer, whether it has a parameter of this worker.
    """

    sizes: dict[str, int]
    weights: dict[str, Stored]
    weight_bytes: int
    tensors: dict[str, Stored]
    state: dict[str, dict[str, Any]]
    shared: dict[str, str]
    extra: dict[str, Any]
    loss: dict[str, Any]
    optimizer: str | None
    groups: list[dict[str, Any]]
    used: list[bool]
    seed: int


def write(
    modules: Sequence[nn.Module],
    optimizer: LocalOptimizer | None,
    seed: int,
    folder: Path,
    label: str,
    *,
    with_weights: bool,
    loss: Mapping[str, Any],
) -> Written:
    """Write the optimizer's state, and ``with_weights`` the modules', to files of ``folder`` named by ``label``.

    ``loss``: what the loss has changed of its state.

    Raises CheckpointError for state that is not plain values and dense tensors, and for an error of the file system.
    """
    weights, extra_state = _state_dict(modules) if with_weights else ({}, {})
    groups = {} if optimizer is None else optimizer.group_of
    names, shared = _names(modules, groups)
    tensors: dict[str, torch.Tensor] = {}
    state = {
        name: encode(dict(optimizer.optimizer.state.get(parameter, {})), name, tensors)
        for parameter, name in names.items()
        if optimizer is not None
    }
    extra = {name: encode(value, name, tensors) for name, value in extra_state.items()}
    sizes: dict[str, int] = {}

    encoded_loss = encode(dict(loss), "$loss", tensors)

    def stored(kind: str, content: Mapping[str, torch.Tensor]) -> dict[str, Stored]:
        if not content:
            return {}
        path = folder / f"{kind}-{label}.safetensors"
        locations = tensor_file.write(path, content)
        sizes[path.name] = path.stat().st_size
        return locations

    return Written(
        sizes=sizes,
        weights=stored("model", weights),
        weight_bytes=sum(tensor.nbytes for tensor in weights.values()),
        tensors=stored("optimizer", tensors),
        state=state,
        shared=shared,
        extra=extra,
        loss=encoded_loss,
        optimizer=None if optimizer is None else optimizer.kind,
        groups=[] if optimizer is None else optimizer.groups(),
        used=[] if optimizer is None else [group is not None for group in optimizer.used_groups()],
        seed=seed,
    )


@dataclass
class Loaded:
    """State that a worker has read and checked, and that is not live until ``apply``."""

    modules: list[nn.Module]
    weights: list[dict[str, Any]]
    optimizer: LocalOptimizer | None
    groups: list[dict[str, Any]]
    state: dict[nn.Parameter, dict[str, Any]]
    loss: dict[str, Any]

    def apply(self) -> None:
        """Replace the live state of the modules and the optimizer."""
        for module, weights in zip(self.modules, self.weights, strict=True):
            module.load_state_dict(weights)
        if self.optimizer is not None:
            self.optimizer.adopt(self.groups, self.state)


def read(modules: Sequence[nn.Module], optimizer: LocalOptimizer | None, folder: Path, manifest: Manifest) -> Loaded:
    """Read and return the state of ``modules`` and ``optimizer``, which stay as they are.

    Raises CheckpointError for a checkpoint of another model or optimizer, and for damaged files.
    """
    _check_names(folder, *_state_dict(modules), manifest)
    with Reader(folder, manifest.weights) as reader, Reader(folder, manifest.tensors) as extra:
        weights = [
            {
                name: decode(manifest.extra[name], extra.get) if is_extra(name) else reader.get(name)
                for name in module.state_dict()
            }
            for module in modules
        ]
        loss = decode(manifest.loss, extra.get)
    for module, state in zip(modules, weights, strict=True):
        _try_extra_state(folder, module, state)
    if optimizer is None:
        return Loaded(list(modules), weights, None, [], {}, loss)
    if optimizer.kind != manifest.optimizer:
        raise CheckpointError(
            f"{folder} holds the state of {manifest.optimizer}, this pipeline's optimizer is {optimizer.kind}"
        )
    group_of = optimizer.group_of
    with Reader(folder, manifest.tensors) as reader:
        groups = decode(manifest.groups, reader.get)
        states = {
            parameter: placed(_saved_state(folder, manifest, name, reader), parameter.device, group_of[parameter])
            for parameter, name in _names(modules, group_of)[0].items()
        }
    try:
        optimizer.check(groups, states)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return Loaded(list(modules), weights, optimizer, groups, states, loss)


def _try_extra_state(folder: Path, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a part of ``module`` does not take its extra state; it has its own again afterwards."""
    parts = dict(module.named_modules(remove_duplicate=False))
    for name in filter(is_extra, state):
        part = parts[name.rpartition(".")[0]]
        if type(part).get_extra_state is nn.Module.get_extra_state:
            continue  # a hook has made it
        own = copy.deepcopy(part.get_extra_state())
        try:
            part.set_extra_state(copy.deepcopy(state[name]))
        except Exception as error:
            raise CheckpointError(
                f"{folder}: {type(part).__name__} does not take {name!r}: {type(error).__name__}: {error}"
            ) from error
        finally:
            part.set_extra_state(own)


def _saved_state(folder: Path, manifest: Manifest, name: str, reader: Reader) -> dict[str, Any]:
    """Return the saved optimizer state of parameter ``name``. Raises CheckpointError if there is none."""
    state = manifest.state_of(name)
    if state is None:
        raise CheckpointError(f"{folder} holds no optimizer state for {name!r}, which was frozen when it was saved")
    return dict(decode(state, reader.get))


def placed(state: dict[str, Any], device: torch.device, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` on the devices that torch's ``Optimizer.load_state_dict`` chooses.

    Tensors are on the parameter's ``device``; step counters stay on the CPU, except for capturable and fused
    optimizers.
    """
    counts_on_device = group.get("capturable") or group.get("fused")
    return {
        key: value if key == "step" and not counts_on_device else map_tensors(lambda t: t.to(device), value)
        for key, value in state.items()
    }


def _check_names(folder: Path, live: Mapping[str, torch.Tensor], extra: Mapping[str, Any], manifest: Manifest) -> None:
    """Raise CheckpointError unless ``manifest`` has every tensor of ``live`` with its dtype and shape."""
    missing = [name for name in live if name not in manifest.weights]
    missing += [name for name in extra if name not in manifest.extra]
    if missing:
        raise CheckpointError(f"{folder} is of another model: it lacks {some(missing)}")
    for name, tensor in live.items():
        saved = manifest.weights[name]
        if (saved.dtype, saved.shape) != (str(tensor.dtype), tuple(tensor.shape)):
            raise CheckpointError(
                f"{folder / saved.file}: tensor {name!r} is {saved.dtype} of shape {saved.shape},"
                f" the model's is {tensor.dtype} of {tuple(tensor.shape)}"
            )


def some(names: Sequence[str]) -> str:
    """Return the first of ``names`` and the count of the rest, for an error message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _state_dict(modules: Sequence[nn.Module]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the extra state of all ``modules`` by name.

    Raises CheckpointError for state that torch could not load back.
    """
    state = {name: value for module in modules for name, value in module.state_dict().items()}
    extra = {name: state.pop(name) for name in list(state) if is_extra(name)}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}, not a tensor: keep it out of state_dict()")
        if value.layout is not torch.strided:
            raise CheckpointError(
                f"{name} is sparse, and checkpoints hold dense tensors: register it with persistent=False and make"
                " it in the layer's constructor, or register its indices and values"
            )
        if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
            raise CheckpointError(f"{name} is expanded, so torch could not load it: register it .contiguous()")
    return state, extra


def _names(
    modules: Sequence[nn.Module], wanted: Container[nn.Parameter]
) -> tuple[dict[nn.Parameter, str], dict[str, str]]:
    """Return (first name by ``wanted`` parameter, first name by further name)."""
    names: dict[nn.Parameter, str] = {}
    shared: dict[str, str] = {}
    for module in modules:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter in wanted and (first := names.setdefault(parameter, name)) != name:
                shared[name] = first
    return names, shared
