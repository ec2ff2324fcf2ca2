"""Read batches on the worker that needs them, and cut them as the driver would.

Every worker that needs inputs or targets runs the same ``make`` with the same random numbers, so all have the same
batches; the driver compares what they say of each before it issues a step. In a step's messages ``ReadPart`` stands
for a micro-batch, and is replaced when its action runs. Batches that may be under way are held. Another one is read
again, from the first on unless the source has ``__getitem__`` and ``__len__``: after a death, a successor has none.
"""

from __future__ import annotations

import ctypes
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset

from rpcpipe.errors import StateError, require
from rpcpipe.model import losses, rng
from rpcpipe.model.batch import Batch, as_pair, cut_inputs, cut_targets
from rpcpipe.model.layers import check_inputs
from rpcpipe.model.microbatch import Nest, map_batch, map_tensors
from rpcpipe.stage import autograd
from rpcpipe.stage.autograd import StageInput
from rpcpipe.transport import user_pickling
from rpcpipe.worker.messages import CHANGED, BatchInfo, BatchRef, ReadAnswer, ReadOrder, ReadPart, Source
from rpcpipe.worker.stage_set import StageSet

_END = object()  # in place of a batch that there is not


class _Read(NamedTuple):
    """A batch in micro-batches: its inputs and, where they are needed, its targets."""

    digest: int
    batch: Batch
    targets: list[Nest] | None


class Reader:
    """Reads batches for the stages ``held`` of one pipeline, on the compute thread."""

    def __init__(self, held: StageSet) -> None:
        self._held = held
        self._sources: dict[int, _Opened] = {}
        self._cuts: dict[BatchRef, _Read] = {}

    def read(self, order: ReadOrder) -> ReadAnswer:
        """Read a batch and say what it is; raises what reading and cutting it raise."""
        self._held.spec.settings.resume()
        ref = order.ref
        self._sources = {key: opened for key, opened in self._sources.items() if key in order.sources}
        if ref.source not in self._sources:
            if order.source is None:
                return ReadAnswer(None, known=False)
            self._sources[ref.source] = _Opened(order.source)
        opened = self._sources[ref.source]
        opened.keep = order.keep
        if (value := opened.batch(ref.number)) is _END:
            return ReadAnswer(None)
        read = self._cut(ref, value, targets=order.targets)
        self._cuts = {one: cut for one, cut in self._cuts.items() if self._is_held(one)}
        batch = read.batch
        info = BatchInfo(batch.weights, batch.counts, batch.samples, batch.by_caller, batch.tokens, read.digest)
        return ReadAnswer(info)

    def _is_held(self, ref: BatchRef) -> bool:
        return ref.source in self._sources and ref.number in self._sources[ref.source].held

    def _cut(self, ref: BatchRef, value: Any, *, targets: bool) -> _Read:
        """Cut a batch as the driver would."""
        inputs, given = as_pair(value, "rp.RemoteBatches needs of make") if ref.paired else (value, None)
        batch = cut_inputs(map_batch(torch.Tensor.detach, inputs), ref.replicas, ref.chunks)
        parts = None
        if targets:
            parts = cut_targets(losses.prepared(self._held.spec.loss, given), batch, ref.replicas, ref.chunks)
        check_inputs(batch.parts[0], self._held.spec.wirings)
        self._cuts[ref] = read = _Read(digest(value), batch, parts)
        return read

    def filled(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the values that an action awaits, by link, with what was read in place of each ReadPart."""
        if not any(type(value) is ReadPart for value in values.values()):
            return values
        return {link: self._part(value) if type(value) is ReadPart else value for link, value in values.items()}

    def _part(self, part: ReadPart) -> StageInput | Nest:
        """Return copies, as of what comes in a message: layers may change them, and memory of their own is aligned."""
        ref, is_target = part.ref, part.slot == "target"
        read = self._cuts.get(ref)
        if read is None or (is_target and read.targets is None):
            read = self._cut(ref, self._again(ref), targets=is_target)
        require(read.digest == part.digest, CHANGED.format(ref.number), error=StateError)
        if is_target:
            assert read.targets is not None
            return map_tensors(torch.Tensor.clone, read.targets[part.chunk])
        inputs: Any = read.batch.parts[part.chunk]
        flow = inputs if part.slot == "input" else None, {name: inputs[name] for name in part.names}
        return autograd.copied(autograd.leave(flow))

    def _again(self, ref: BatchRef) -> Any:
        opened = self._sources.get(ref.source)
        value = _END if opened is None else opened.batch(ref.number)
        require(value is not _END, CHANGED.format(ref.number), error=StateError)
        return value


class _Opened:
    """A source that is being read. ``held``: the batches that may be under way, by number; ``keep``: how many."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.held: OrderedDict[int, Any] = OrderedDict()
        self.keep = 1
        self._made: Any = None
        self._iterator: Iterator[Any] | None = None
        self._next = 0  # the number of the iterator's next batch
        self._random: tuple[torch.Tensor, rng.PythonState] | None = None

    def batch(self, number: int) -> Any:
        """Return batch ``number``, or _END; raises what ``make`` and its batches raise, and then begins anew."""
        if number in self.held:
            return self.held[number]
        try:
            with self._own_random():
                value = self._read(number)
        except BaseException:
            self._forget()
            raise
        if value is not _END:
            self.held[number] = value
            while len(self.held) > self.keep:
                self.held.popitem(last=False)
        return value

    def _read(self, number: int) -> Any:
        if self._made is None:
            rng.seed_all(self._source.seed)
            self._made = user_pickling.loads(self._source.make)()
        made = self._made
        if hasattr(made, "__getitem__") and hasattr(made, "__len__") and not isinstance(made, IterableDataset):
            rng.seed_all(self._source.seed + number)
            return made[number] if number < len(made) else _END
        if number < self._next:
            self._forget()
            return self._read(number)
        if self._iterator is None:
            self._iterator = iter(made)
        for value in self._iterator:
            self._next += 1
            if self._next > number:
                return value
        return _END

    def _forget(self) -> None:
        self._made = self._iterator = self._random = None
        self._next = 0

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Let random numbers in the block go on from where they were in the last one, and those outside as well."""
        before = torch.get_rng_state(), rng.python_state()
        try:
            if self._random is not None:
                _set_random(*self._random)
            yield
            self._random = torch.get_rng_state(), rng.python_state()
        finally:
            _set_random(*before)


def _set_random(torch_state: torch.Tensor, python_state: rng.PythonState) -> None:
    torch.set_rng_state(torch_state)
    rng.set_python_state(python_state)


def digest(batch: Any) -> int:
    """Return a checksum of all tensors of ``batch``, with their shapes and types, in its order."""
    found = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal found
        found = zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype} {tensor.layout}".encode(), found)
        if tensor.layout is torch.strided and tensor.numel():
            data = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
            found = zlib.crc32((ctypes.c_char * data.nbytes).from_address(data.data_ptr()), found)
        return tensor

    map_batch(add, batch)
    return found
