"""Buffers that a forward changes, so that each micro-batch's graph and recomputation see their own values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from rpcpipe.model.batchnorm import DeferredBatchNorm

# (module, name of its buffer)
Key = tuple[nn.Module, str]
# None for a buffer without a value, or that a forward registers later.
Values = dict[Key, torch.Tensor | None]

# In training their outputs and gradients do not depend on the running statistics, so a graph may keep those that move.
_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class _Buffers:
    """The buffers of the modules ``owners``; ``changing`` is known once a forward was observed.

    ``late`` were registered by a forward: without a value they are not there at all.
    """

    owners: list[nn.Module]
    keys: list[Key]
    statistics: list[Key]
    changing: list[Key] | None = None
    late: set[Key] = field(default_factory=set)


@dataclass
class Observation:
    """What the buffers were before a forward: ``values`` of those that may change, and ``versions`` to find others."""

    values: Values
    versions: list[tuple[Key, torch.Tensor | None, int]]


class ForwardBuffers:
    """The buffers of a stage's layers.

    Invariant: a buffer that forwards change is another tensor for each forward. What an earlier micro-batch's graph has
    saved, or its recomputation starts from, so keeps its values.
    """

    def __init__(self, module: nn.Sequential) -> None:
        self._module = module
        self._known: dict[tuple[int, int], _Buffers] = {}

    def before(self, start: int, stop: int) -> Observation:
        """Prepare a forward of layers ``start`` … ``stop - 1``; to be passed to ``after``."""
        buffers = self._buffers(start, stop)
        if buffers.changing is None:
            return Observation(_copies({key: _live(key) for key in buffers.keys}), _versions(buffers.keys))
        values = {key: _live(key) for key in buffers.changing}
        _put(_copies(values))
        return Observation(values, _versions([key for key in buffers.keys if key not in values]))

    def after(self, start: int, stop: int, seen: Observation, *, dropped: bool) -> Values:
        """Return the values before the forward of the buffers that it changed.

        Raises RuntimeError if a forward whose activations were ``dropped`` is the first to change a buffer, and not the
        first of all: its recomputation would start from another value.
        """
        buffers = self._buffers(start, stop)
        moved = [key for key, buffer, version in seen.versions if _version(_live(key), buffer) != version]
        if len(present := _keys(buffers.owners)) > len(buffers.keys):
            new = [key for key in present if key not in set(buffers.keys)]
            buffers.keys, buffers.late, moved = present, buffers.late | set(new), [*moved, *new]
            seen.values.update(dict.fromkeys(new))
        if buffers.changing is None:
            # A kernel may write without counting a version, and a value may come out as it was.
            buffers.changing = [
                key for key, value in seen.values.items() if key in moved or not _equal(_live(key), value)
            ]
            return {key: seen.values[key] for key in buffers.changing}
        buffers.changing = [*buffers.changing, *moved]
        if moved and dropped:
            raise RuntimeError(
                f"{type(moved[0][0]).__name__} changed its buffer {moved[0][1]!r} for this micro-batch and not for"
                " those before; it cannot be recomputed: call again, or pass checkpoint='never'"
            )
        return seen.values

    @contextmanager
    def as_of(self, start: int, stop: int, values: Values) -> Iterator[None]:
        """Let buffers have ``values`` inside the block, for a recomputation; what it changes is dropped."""
        buffers = self._buffers(start, stop)
        live = {key: _live(key) for key in (*(buffers.changing or ()), *buffers.statistics)}
        _put(_copies(live) | values, buffers.late)
        try:
            yield
        finally:
            _put(live)

    def _buffers(self, start: int, stop: int) -> _Buffers:
        if (start, stop) not in self._known:
            owners = [owner for layer in list(self._module)[start:stop] for owner in layer.modules()]
            statistics = [key for owner in owners if _keeps_statistics(owner) for key in _keys([owner])]
            others = [owner for owner in owners if not _keeps_statistics(owner)]
            self._known[start, stop] = _Buffers(others, _keys(others), statistics)
        return self._known[start, stop]


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
