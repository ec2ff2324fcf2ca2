"""Memory that outlives its process: tensors and pickled records in an anonymous file.

Whoever has the file's descriptor open (``/proc/<pid>/fd/<number>`` of a live process of the same user) has the memory,
also what it grows by later. One process at a time writes it; its death, at any instant, leaves it readable.

The file begins with words and a directory of records, twice: a commit fills the directory that is not current and then
sets the one word that says which is. Tensors lie behind it, wherever there was room. Nothing says which extents are in
use: those that the current records refer to. What they refer to is never overwritten but by the tensors' owners.
"""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import struct
import threading
import weakref
import zlib
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import psutil
import torch

from rpcpipe.errors import ArgumentError, StateError
from rpcpipe.model.memory import give_heap_back
from rpcpipe.stage import kept_image
from rpcpipe.transport.slots import map_file
from rpcpipe.transport.user_pickling import Pickler

_ALIGNMENT = 64  # bytes, as torch's own: kernels choose by alignment, and bits must stay
_PAGE = 4096
_MAGIC = 0x31_54_50_45_4B_50_52_31
_GROWTH = 64 << 20  # bytes of the file, which take no memory before they are written
_RECORDS = 16
_GIVEN_BACK = 8 << 20  # bytes by which the memory grows as tensors move here, from which on the heap is given back
_RECORD_WORDS = 3  # offset, length, checksum
_MAP_NORESERVE = 0x4000


class Word(IntEnum):
    """The words at the memory's begin."""

    MAGIC = 0
    CURRENT = 1  # the directory that counts: 0 or 1, or -1 before the first commit
    BEGUN = 2  # twice the number of the step that was begun last, plus 1 if it trains
    UPDATING = 3  # the step whose update may have begun, for which the records have a copy of what was before; or -1
    CONDITION = 4
    START = 5  # a step whose begin is in a record, or -1
    OTHER_START = 6  # another: one may run ahead
    UPDATED = 7  # the step whose update has ended last, or -1


class Condition(IntEnum):
    """What a successor could take over."""

    KEPT = 0  # all, up to the begin or the end of the step that was begun last
    CHANGING = 1  # all, but a call between steps is changing values in place, and may be half done
    STREAM = 2  # the snapshots of a stream, from one of which it goes on
    LOST = 3  # nothing: something cannot be pickled, or memory could not grow; the worker's log says what


class Head(NamedTuple):
    """What the memory says of its state at once, for whoever keeps the descriptor.

    ``step``: the one that was begun last. ``updating``: the one whose update may have begun. -1: none.
    """

    step: int
    training: bool
    updating: int
    condition: Condition


def look(descriptor: int) -> Head:
    """Return the head of the memory of ``descriptor``, which another process may be writing."""
    words = struct.unpack(f"{len(Word)}q", os.pread(descriptor, 8 * len(Word), 0))
    begun = words[Word.BEGUN]
    return Head(begun >> 1, bool(begun & 1), words[Word.UPDATING], Condition(words[Word.CONDITION]))


class Extents:
    """Which bytes are in use; takes and frees extents, whose sizes are multiples of the alignment."""

    def __init__(self, start: int, used: Mapping[int, int] | None = None) -> None:
        self.end = start
        self._free: list[tuple[int, int]] = []  # (offset, size), sorted, with no two that touch
        for offset, size in sorted((used or {}).items()):
            if offset > self.end:
                self._free.append((self.end, offset - self.end))
            self.end = max(self.end, offset + size)

    def take(self, size: int) -> int:
        """Return the offset of ``size`` bytes: the first gap that is large enough, or the end."""
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        self.end += size
        return self.end - size

    def give(self, offset: int, size: int) -> None:
        """Free an extent."""
        index = bisect_left(self._free, (offset, size))
        if index < len(self._free) and self._free[index][0] == offset + size:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            offset, size = self._free[index - 1][0], self._free[index - 1][1] + size
            del self._free[index - 1]
            index -= 1
        self._free.insert(index, (offset, size))


class Place(NamedTuple):
    """A tensor in the memory: its storage's extent, and how it lies in that."""

    extent: tuple[int, int]
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Record(NamedTuple):
    """A record's bytes, and the extents of tensors that it refers to."""

    data: bytes
    extents: frozenset[tuple[int, int]]


class KeptMemory:
    """The memory of the file ``descriptor``, which belongs to it from now on."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor).atexit = False
        # Addresses are for free; the file may grow below them, and whoever else has mapped it sees that.
        self._reach = _rounded(psutil.virtual_memory().total + psutil.swap_memory().total, _PAGE)
        self._base, self._unmap = map_file(descriptor, self._reach, _MAP_NORESERVE)
        weakref.finalize(self, self._unmap).atexit = False
        self._size = os.fstat(descriptor).st_size
        self._extents = Extents(_PAGE)
        self._records: dict[int, tuple[int, int]] = {}  # by number, where its bytes are
        self._referred: dict[int, frozenset[tuple[int, int]]] = {}
        self._dead: deque[tuple[int, int]] = deque()  # extents whose storage is gone; any thread appends
        self._loading: dict[tuple[int, int], torch.UntypedStorage] = {}
        self._touched: set[tuple[int, int]] = set()  # by the record that is loaded

    @classmethod
    def create(cls) -> KeptMemory:
        """Return new memory; raises OSError where the system gives none."""
        memory = cls(os.memfd_create("rpcpipe", os.MFD_CLOEXEC))
        memory.grow(_GROWTH)
        for word in Word:
            memory[word] = -1
        memory[Word.CONDITION] = Condition.LOST
        memory[Word.MAGIC] = _MAGIC
        return memory

    @classmethod
    def open(cls, path: str, *, copy: bool = False) -> KeptMemory:
        """Return the memory of the file ``path``, which a process that has ended has written; to be loaded first.

        ``copy``: return a copy of it, in a file of its own.
        """
        memory = cls(kept_image.copied(path) if copy else os.open(path, os.O_RDWR | os.O_CLOEXEC))
        if os.fstat(memory.descriptor).st_size < _GROWTH or memory[Word.MAGIC] != _MAGIC or memory[Word.CURRENT] < 0:
            raise ArgumentError(f"{path} is no memory of a worker, or of one that died before it had written anything")
        return memory

    # --- words ---

    def __getitem__(self, word: int) -> int:
        return ctypes.c_int64.from_address(self._base + 8 * word).value

    def __setitem__(self, word: int, value: int) -> None:
        """Store ``value`` at once: one instruction, after all that was written before."""
        ctypes.c_int64.from_address(self._base + 8 * word).value = value

    # --- tensors ---

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether ``tensor`` lies in the memory, or has none."""
        return 0 <= tensor.data_ptr() - self._base < self._reach or not tensor.numel()

    @staticmethod
    def can_hold(tensor: torch.Tensor) -> bool:
        """Return whether the memory could hold ``tensor``."""
        return (
            tensor.layout is torch.strided
            and tensor.device.type == "cpu"
            and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_nested)
            and not (tensor.is_inference() or torch._is_zerotensor(tensor))
        )

    def take_in(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Move ``tensors`` here where they are not; return whether any was moved.

        They stay the same objects, and those of one storage share one again: tensors of a storage move together.
        """
        moved: dict[int, torch.UntypedStorage] = {}
        before = self._extents.end
        for tensor in tensors:
            if not self.can_hold(tensor) or self.holds(tensor):
                continue
            old = tensor.untyped_storage()
            if (address := old.data_ptr()) not in moved:
                moved[address] = self._storage(self._take(old.nbytes()))
                ctypes.memmove(moved[address].data_ptr(), address, old.nbytes())
            tensor.data = _view(moved[address], tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
        if self._extents.end - before > _GIVEN_BACK:
            del old  # the last of those that have moved
            give_heap_back()
        return bool(moved)

    def room_for(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an empty tensor here of the shape, strides and dtype of a copy of ``tensor``, which can be held."""
        like = torch.empty_like(tensor, device="meta")
        storage = self._storage(self._take(like.untyped_storage().nbytes()))
        return _view(storage, like.dtype, 0, like.shape, like.stride())

    def place(self, tensor: torch.Tensor) -> Place | torch.Tensor:
        """Return where ``tensor`` lies, which pickles fast; itself if it is not here, or more than a plain tensor."""
        if type(tensor) is not torch.Tensor or tensor.requires_grad or tensor.layout is not torch.strided:
            return tensor
        if (extent := self.extent_of(tensor.untyped_storage())) is None:
            return tensor
        return Place(extent, tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())

    def extent_of(self, storage: torch.UntypedStorage) -> tuple[int, int] | None:
        """Return where ``storage`` lies in the memory, as (offset, bytes); None if it does not."""
        offset, size = storage.data_ptr() - self._base, storage.nbytes()
        return (offset, size) if size and 0 <= offset < self._reach else None

    def _take(self, size: int) -> tuple[int, int]:
        offset = self._extents.take(_rounded(size, _ALIGNMENT))
        self.grow(self._extents.end)
        return offset, size

    def grow(self, size: int) -> None:
        """Make the file ``size`` bytes long at least; raises OSError or StateError where it cannot be."""
        if size > self._size:
            size = _rounded(size, _GROWTH)
            if size > self._reach:
                raise StateError(f"a worker's memory cannot grow to {size >> 20} MiB, more than the host has")
            os.ftruncate(self.descriptor, size)
            self._size = size

    def _storage(self, extent: tuple[int, int]) -> torch.UntypedStorage:
        """Return a storage on an extent that is taken; the extent is free again some time after the storage is gone."""
        offset, size = extent
        array = (ctypes.c_ubyte * size).from_address(self._base + offset)
        # The reference to this object keeps the mapping as long as the storage lives.
        weakref.finalize(array, self._released, extent).atexit = False
        return torch.frombuffer(array, dtype=torch.uint8).untyped_storage()

    def _released(self, extent: tuple[int, int]) -> None:
        self._dead.append(extent)

    # --- records ---

    def commit(self, records: Mapping[Any, Record]) -> None:
        """Replace ``records`` by number, all at once; others stay."""
        after, referred, replaced = dict(self._records), dict(self._referred), []
        for number, record in records.items():
            offset, size = self._take(len(record.data))
            ctypes.memmove(self._base + offset, record.data, size)
            replaced += [after[number]] if number in after else []
            after[number], referred[number] = (offset, size), record.extents
        other = 0 if self[Word.CURRENT] == 1 else 1
        for number in range(_RECORDS):
            offset, size = after.get(number, (0, 0))
            word = _word_of(other, number)
            checksum = zlib.crc32(records[number].data) if number in records else self[_word_of(1 - other, number) + 2]
            self[word], self[word + 1], self[word + 2] = offset, size, checksum
        self[Word.CURRENT] = other
        self._records, self._referred = after, referred
        for offset, size in replaced:
            self._extents.give(offset, _rounded(size, _ALIGNMENT))
        self._sweep()

    def _sweep(self) -> None:
        """Free the extents whose storage is gone and to which no record refers."""
        referred = frozenset[tuple[int, int]]().union(*self._referred.values()) if self._dead else frozenset()
        for _ in range(len(self._dead)):
            offset, size = self._dead.popleft()
            if (offset, size) in referred:
                self._dead.append((offset, size))
            else:
                self._extents.give(offset, _rounded(size, _ALIGNMENT))

    def dumps(self, value: Any) -> Record:
        """Return ``value`` pickled, with references to the tensors that lie here; raises what pickling raises."""
        with io.BytesIO() as buffer:
            pickler = _KeptPickler(buffer, self)
            pickler.dump(value)
            return Record(buffer.getvalue(), frozenset(pickler.extents))

    def load(self) -> dict[int, Any]:
        """Return the values of all records, whose tensors lie here; the rest of the memory is free from then on."""
        values, used, current = dict[int, Any](), dict[int, int](), self[Word.CURRENT]
        for number in range(_RECORDS):
            offset, size, checksum = (self[_word_of(current, number) + index] for index in range(_RECORD_WORDS))
            if not size:
                continue
            data = ctypes.string_at(self._base + offset, size)
            if zlib.crc32(data) != checksum:
                raise ArgumentError(f"record {number} of a worker's memory is damaged")
            values[number] = self._unpickled(data)
            self._records[number], self._referred[number] = (offset, size), frozenset(self._touched)
            used |= {offset: _rounded(size, _ALIGNMENT) for offset, size in [(offset, size), *self._touched]}
            self._touched.clear()
        self._loading.clear()
        self._extents = Extents(_PAGE, used)
        return values

    def write_image(self, descriptor: int, leave_out: Collection[int]) -> None:
        """Write into the file ``descriptor`` what the current records but ``leave_out`` say, and the tensors there.

        Whoever goes on from it has no update and no begin of a step to take back.
        """
        head = bytearray(ctypes.string_at(self._base, _PAGE))
        for word in (Word.UPDATING, Word.START, Word.OTHER_START):
            struct.pack_into("q", head, 8 * word, -1)
        for number in leave_out:
            struct.pack_into(f"{_RECORD_WORDS}q", head, 8 * _word_of(self[Word.CURRENT], number), 0, 0, 0)
        extents = set[tuple[int, int]]()
        for number in self._records.keys() - {*leave_out}:
            extents |= {self._records[number], *self._referred[number]}
        values = ((offset, self._bytes(offset, size)) for offset, size in sorted(extents))
        kept_image.write(descriptor, self._size, [(0, bytes(head)), *values])

    def _bytes(self, offset: int, size: int) -> memoryview:
        return memoryview((ctypes.c_ubyte * size).from_address(self._base + offset)).cast("B")

    def _unpickled(self, data: bytes) -> Any:
        _unpickling.memory = self
        try:
            return pickle.loads(data)
        finally:
            del _unpickling.memory

    def loading(self, extent: tuple[int, int]) -> torch.UntypedStorage:
        """Return the storage on ``extent``: one and the same as often as records refer to it."""
        self._touched.add(extent)
        if extent not in self._loading:
            self._loading[extent] = self._storage(extent)
        return self._loading[extent]


_unpickling = threading.local()


class _KeptPickler(Pickler):
    """Pickles for the process that takes ``memory`` over: what lies there stays there."""

    def __init__(self, buffer: io.BytesIO, memory: KeptMemory) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self.extents: set[tuple[int, int]] = set()
        self._memory = memory

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Place:
            self.extents.add(value.extent)
            return _placed, tuple(value)
        if isinstance(value, torch.UntypedStorage) and (extent := self._memory.extent_of(value)) is not None:
            self.extents.add(extent)
            return _storage, (extent,)
        return super().reducer_override(value)


def _storage(extent: tuple[int, int]) -> torch.UntypedStorage:
    """Return the storage on ``extent`` of the memory whose record this thread unpickles."""
    memory: KeptMemory = _unpickling.memory
    return memory.loading(extent)


def _placed(extent: tuple[int, int], *layout: Any) -> torch.Tensor:
    return _view(_storage(extent), *layout)


def _word_of(directory: int, number: int) -> int:
    return 64 + (directory * _RECORDS + number) * _RECORD_WORDS


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def _view(storage: torch.UntypedStorage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, size, stride)
