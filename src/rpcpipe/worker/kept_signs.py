"""Tell cheaply whether tensors lie elsewhere than before, and whether what is around them has changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def tensors_of(owner: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers that ``owner`` itself has."""
    return [t for t in (*owner._parameters.values(), *owner._buffers.values()) if t is not None]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a nest of state."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def sign_of(tensor: torch.Tensor) -> Any:
    """Return what tells whether ``tensor`` lies elsewhere; nothing equals it if that cannot be told."""
    return tensor.data_ptr() if tensor.layout is torch.strided else object()


def addresses(tensors: list[torch.Tensor]) -> Any:
    """Return the ``sign_of`` of each of ``tensors``."""
    try:
        return list(map(torch.Tensor.data_ptr, tensors))
    except RuntimeError:  # one has no storage
        return list(map(sign_of, tensors))


def signs_of_state(state: list[Any]) -> Any:
    """Return the ``signs`` of an optimizer's state, fast where that is dicts of tensors."""
    tensors = [item for own in state if own for item in own.values()]
    try:
        return [list(own or ()) for own in state], addresses(tensors), list(map(torch.Tensor.size, tensors))
    except TypeError:  # not all are tensors
        return signs(state)


def signs(value: Any) -> Any:
    """Return what tells whether a nest of state has changed but for the values of its tensors."""
    if isinstance(value, torch.Tensor):
        return sign_of(value), value.shape
    if isinstance(value, dict):
        return [(key, signs(item)) for key, item in value.items()]
    if isinstance(value, list):
        return list(map(signs, value))
    return value if value is None or type(value) in (bool, int, float, str) else object()
