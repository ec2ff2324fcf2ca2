"""What layers keep outside of parameters and buffers, so that a recomputation goes on from what the forward had.

Attributes, the objects of the user's own in them, lists, dicts, sets and random generators. A tensor in one of them
that a forward changes in place cannot be had back, and is refused.
"""

from __future__ import annotations

import collections
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ModelError

# Attributes of every module: its tensors, parts and hooks, and modes, which the stage switches.
_TORCHS = frozenset(vars(nn.Module()))
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device))
_CONTAINERS = (dict, list, set, collections.deque)
_OPAQUE = (type, FunctionType, MethodType, ModuleType)


class _Live:
    """Stands for a tensor with a graph, which no later forward may use."""


class Attributes:
    """The attributes of ``parts``, modules without those below them and objects of the user's, when it is made."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts
        self._kept: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[str, torch.Tensor, int]] = []
        seen: set[int] = set()
        for part in parts:
            self._walk(type(part).__name__, part, seen)

    def _walk(self, where: str, value: Any, seen: set[int]) -> None:
        """Keep what is in ``value``, a part of the module or object that is called ``where``."""
        if type(value) in _PLAIN or id(value) in seen or isinstance(value, _OPAQUE):
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            self._walk_attributes(value, seen)
        elif isinstance(value, torch.Tensor):
            if not isinstance(value, nn.Parameter) and value.grad_fn is None and not value.is_inference():
                self._tensors.append((where, value, value._version))
        elif (state := _generator_state(value)) is not None:
            self._kept.append((value, state))
        elif isinstance(value, _CONTAINERS):
            self._kept.append((value, value.copy()))
            for item in value.values() if isinstance(value, dict) else value:
                self._walk(where, item, seen)
        elif isinstance(value, tuple):
            for item in value:
                self._walk(where, item, seen)
        elif _is_users(value):
            self._walk_attributes(value, seen)

    def _walk_attributes(self, value: Any, seen: set[int]) -> None:
        own = _own(value)
        self._kept.append((value, own))
        for name, item in own.items():
            if type(item) not in _PLAIN:
                self._walk(f"{type(value).__name__}.{name}", item, seen)

    def __getstate__(self) -> dict[str, Any]:
        """Versions count from 0 where this is unpickled; one that a tensor has left stays one that it does not have."""
        tensors = [(where, tensor, 0 if tensor._version == version else -1) for where, tensor, version in self._tensors]
        return vars(self) | {"_tensors": tensors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on from the versions of now."""
        vars(self).update(state)
        self._tensors = [(where, t, t._version if version == 0 else -1) for where, t, version in self._tensors]

    def same(self, other: Attributes) -> bool:
        """Return whether nothing has changed between the times when the two were made."""
        return (
            len(self._kept) == len(other._kept)
            and len(self._tensors) == len(other._tensors)
            and all(a is b and _alike(x, y) for (a, x), (b, y) in zip(self._kept, other._kept, strict=True))
            and all(
                a is b and version == other_version
                for (_, a, version), (_, b, other_version) in zip(self._tensors, other._tensors, strict=True)
            )
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors in attributes, without parameters."""
        return [tensor for _, tensor, _ in self._tensors]

    def check(self, why: str, instead: str) -> None:
        """Raise ModelError if a tensor was changed in place since; the message says ``why`` and what to do instead."""
        for where, tensor, version in self._tensors:
            if tensor._version != version:
                raise ModelError(
                    f"the forward changes the tensor {where} in place, {why}:"
                    f" register it as a buffer (persistent=False keeps it out of state_dict), or {instead}"
                )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Let the layers have these attributes inside the block; what it changes is dropped."""
        live = Attributes(self._parts)
        self.put()
        try:
            yield
        finally:
            live.put()

    def put(self) -> None:
        """Give the layers these attributes."""
        for owner, state in self._kept:
            if isinstance(owner, (list, collections.deque)):
                owner.clear()
                owner.extend(state)
            elif isinstance(owner, (dict, set)):
                owner.clear()
                owner.update(state)
            elif isinstance(owner, torch.Generator):
                owner.set_state(state)
            elif isinstance(owner, random.Random):
                owner.setstate(state)
            elif _is_numpys(owner):
                owner.bit_generator.state = state
            else:
                _set_own(owner, state)


def _alike(state: Any, other: Any) -> bool:
    """Return whether two states, of an owner or a generator, hold the same objects or equal plain values."""
    if state is other:
        return True
    if type(state) is not type(other):
        return False
    if isinstance(state, dict):
        return state.keys() == other.keys() and all(_alike(item, other[key]) for key, item in state.items())
    if isinstance(state, (list, tuple, collections.deque)):
        return len(state) == len(other) and all(map(_alike, state, other))
    if isinstance(state, torch.Tensor):  # of a generator: tensors in attributes are compared by their versions
        return state.dtype is torch.uint8 and torch.equal(state, other)
    if isinstance(state, set):
        return len(state) == len(other) and all(any(item is one for one in other) for item in state)
    return type(state) in _PLAIN and bool(state == other)


def _own(value: Any) -> dict[str, Any]:
    own = vars(value)
    return {name: _kept(own[name]) for name in own.keys() - _TORCHS}


def _kept(item: Any) -> Any:
    return _Live if isinstance(item, torch.Tensor) and item.grad_fn is not None else item


def _set_own(value: Any, state: dict[str, Any]) -> None:
    own = vars(value)
    for name in own.keys() - state.keys() - _TORCHS:
        del own[name]
    own.update((name, item) for name, item in state.items() if item is not _Live)


def _generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    return value.bit_generator.state if _is_numpys(value) else None


def _is_numpys(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator)


def _is_users(value: Any) -> bool:
    """Return whether ``value`` is an object with attributes, of a class that is not Python's or torch's."""
    package = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and package != "torch" and package not in sys.stdlib_module_names
