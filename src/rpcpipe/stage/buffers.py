"""Buffers that a forward changes, so that each micro-batch's graph and recomputation see their own values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from rpcpipe.errors import ModelError
from rpcpipe.model.batchnorm import DeferredBatchNorm

# (module, name of its buffer)
Key = tuple[nn.Module, str]
# None for a buffer without a value, or that a forward registers later.
Values = dict[Key, torch.Tensor | None]

# In training their outputs and gradients do not depend on the running statistics, so a graph may keep those that move.
_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class Observation:
    """What the buffers were before a forward: ``values`` of those that may change, and ``versions`` to find others."""

    values: Values
    versions: list[tuple[Key, torch.Tensor | None, int]]


class ForwardBuffers:
    """The buffers of ``modules``, which run in one forward.

    Invariant: a buffer that forwards change is another tensor for each forward. What an earlier micro-batch's graph has
    saved, or its recomputation starts from, so keeps its values.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._statistics = _keys([module for module in modules if _keeps_statistics(module)])
        self._owners = [module for module in modules if not _keeps_statistics(module)]
        self._keys = _keys(self._owners)
        self._changing: list[Key] | None = None  # known once a forward was observed
        self._late: set[Key] = set()  # registered by a forward: without a value they are not there at all

    def before(self) -> Observation:
        """Prepare a forward; to be passed to ``after``."""
        if self._changing is None:
            return Observation(_copies({key: _live(key) for key in self._keys}), _versions(self._keys))
        values = {key: _live(key) for key in self._changing}
        _put(_copies(values))
        return Observation(values, _versions([key for key in self._keys if key not in values]))

    def after(self, seen: Observation, *, dropped: bool) -> Values:
        """Return the values before the forward of the buffers that it changed.

        Raises ModelError if a forward whose activations were ``dropped`` is the first to change a buffer, and not the
        first of all: its recomputation would start from another value.
        """
        moved = [key for key, buffer, version in seen.versions if _version(_live(key), buffer) != version]
        if len(present := _keys(self._owners)) > len(self._keys):
            new = [key for key in present if key not in set(self._keys)]
            self._keys, self._late, moved = present, self._late | set(new), [*moved, *new]
            seen.values.update(dict.fromkeys(new))
        if self._changing is None:
            # A kernel may write without counting a version, and a value may come out as it was.
            self._changing = [
                key for key, value in seen.values.items() if key in moved or not _equal(_live(key), value)
            ]
            return {key: seen.values[key] for key in self._changing}
        self._changing = [*self._changing, *moved]
        if moved and dropped:
            raise ModelError(
                f"{type(moved[0][0]).__name__} changed its buffer {moved[0][1]!r} for this micro-batch and not for"
                " those before; it cannot be recomputed: call again, or pass checkpoint='never'"
            )
        return seen.values

    @contextmanager
    def as_of(self, values: Values) -> Iterator[None]:
        """Let buffers have ``values`` inside the block, for a recomputation; what it changes is dropped."""
        live = {key: _live(key) for key in (*(self._changing or ()), *self._statistics)}
        _put(_copies(live) | values, self._late)
        try:
            yield
        finally:
            _put(live)


def _keeps_statistics(owner: nn.Module) -> bool:
    return type(owner) in _STATISTICS or isinstance(owner, DeferredBatchNorm)


def _keys(owners: Sequence[nn.Module]) -> list[Key]:
    return [(owner, name) for owner in owners for name in owner._buffers]


def _versions(keys: Sequence[Key]) -> list[tuple[Key, torch.Tensor | None, int]]:
    return [(key, live := _live(key), _version(live, live)) for key in keys]


def _version(live: torch.Tensor | None, before: torch.Tensor | None) -> int:
    """Return the count of in-place changes of ``live``; -2 if it is another tensor than ``before``."""
    if live is not before:
        return -2
    return -1 if live is None else live._version


def _copies(values: Values) -> Values:
    """Return copies of ``values``; those that are in the same memory, of one or several modules, are so again."""
    storages = Counter(_storage(value) for value in {id(value): value for value in values.values()}.values())
    storages[None] = 1
    clones: dict[int | None, torch.UntypedStorage] = {}
    copies: dict[int, torch.Tensor | None] = {id(None): None}
    for value in values.values():
        if value is None or id(value) in copies:
            continue
        if storages[storage := _storage(value)] == 1:
            copies[id(value)] = value.clone()
            continue
        clone = clones.setdefault(storage, value.untyped_storage().clone())  # type: ignore[no-untyped-call]
        place = value.storage_offset(), value.shape, value.stride()
        copies[id(value)] = value.new_empty(0).set_(clone, *place)
    return {key: copies[id(value)] for key, value in values.items()}


def _storage(value: torch.Tensor | None) -> int | None:
    return None if value is None or value.layout is not torch.strided else int(value.untyped_storage()._cdata)


def _live(key: Key) -> torch.Tensor | None:
    return key[0]._buffers.get(key[1])


def _put(values: Values, late: Collection[Key] = ()) -> None:
    for key, value in values.items():
        if value is None and key in late:
            key[0]._buffers.pop(key[1], None)
        else:
            key[0]._buffers[key[1]] = value


def _equal(buffer: torch.Tensor | None, before: torch.Tensor | None) -> bool:
    """Return whether nothing changed; False where that is not defined, as for sparse tensors."""
    if buffer is None or before is None:
        return buffer is before
    return buffer.layout == torch.strided and buffer.shape == before.shape and torch.equal(buffer, before)
