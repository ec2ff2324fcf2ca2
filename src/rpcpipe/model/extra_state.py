"""What of a model's ``state_dict`` is no tensor: the values that modules return from ``get_extra_state``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from rpcpipe.errors import CheckpointError
from rpcpipe.model.microbatch import map_tensors
from rpcpipe.transport import user_pickling

_SUFFIX = "_extra_state"


class ExtraState(NamedTuple):
    """A value of ``state_dict`` in a message, where it is no tensor."""

    pickled: bytes


def is_extra(key: str) -> bool:
    """Return whether ``key`` of a ``state_dict`` is that of a module's ``get_extra_state``."""
    return key.rpartition(".")[2] == _SUFFIX


def packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` for a message, on the CPU; raises CheckpointError for a value that cannot be pickled."""
    return {key: _packed(key, value) for key, value in state.items()}


def _packed(key: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    try:
        return ExtraState(user_pickling.dumps(map_tensors(lambda tensor: tensor.detach().cpu(), value)))
    except Exception as error:
        raise CheckpointError(f"{key}, a {type(value).__name__}, cannot be pickled: {error}") from error


def unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of ``packed``."""
    return {
        key: user_pickling.loads(value.pickled) if isinstance(value, ExtraState) else value
        for key, value in state.items()
    }


def shape_differs(key: str, one: Any, other: Any) -> bool:
    """Return whether two values of ``key`` are tensors of different shapes, which extra state may have."""
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return tensors and not is_extra(key) and one.shape != other.shape
