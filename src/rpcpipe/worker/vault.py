"""Snapshots of stages in the memory of two workers each: of the one that holds them, and of its keeper on another host.

A snapshot is an image of what the worker keeps (``kept_image``) between two steps. Taking it is one copy on the compute
thread; it travels to the keeper in pieces, one at a time, while training goes on. Files are used in turn by snapshots
of even and of odd number, so the one before is whole until all workers have the next.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from rpcpipe.stage import kept_image
from rpcpipe.stage.kept_image import Piece
from rpcpipe.transport.base import Transport
from rpcpipe.worker.messages import KeptAt

# Writes an image into a file, given by its descriptor.
WriteImage = Callable[[int], None]


@dataclass(eq=False)
class _File:
    """The memory of snapshot ``number`` of one worker; ``whole`` once all of it is there."""

    descriptor: int = field(default_factory=lambda: os.memfd_create("rpcpipe-snapshot", os.MFD_CLOEXEC))
    number: int = -1
    whole: bool = False
    waiting: list[tuple[int, Future[Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self.descriptor).atexit = False

    @property
    def at(self) -> KeptAt:
        return KeptAt(os.getpid(), self.descriptor)


class Vault:
    """The snapshots that are in this process's memory. Any thread may call any method."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._files: dict[tuple[str, str, int], _File] = {}  # by pipeline, worker, and whether the number is odd

    def take(self, pipeline: str, of: str, number: int, keeper: str, write_image: WriteImage) -> KeptAt:
        """Take snapshot ``number`` of worker ``of``, which this process is now, and begin to send it to ``keeper``.

        Returns where it lies.
        """
        with self._lock:
            file = self._file(pipeline, of, number)
            file.number, file.whole = number, False
        write_image(file.descriptor)
        file.whole = True
        self.send(pipeline, of, number, f"/proc/self/fd/{file.descriptor}", keeper)
        return file.at

    def send(self, pipeline: str, of: str, number: int, path: str, to: str) -> None:
        """Begin to send snapshot ``number`` of worker ``of``, which is in the file ``path``, to worker ``to``."""
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _Sending(self._transport, (pipeline, of, number), to, source).next()

    def store(self, pipeline: str, of: str, number: int, size: int, piece: tuple[int, torch.Tensor] | None) -> None:
        """Store a ``piece`` of snapshot ``number`` of worker ``of``, a file of ``size`` bytes; None is its end."""
        with self._lock:
            file = self._file(pipeline, of, number)
            if file.number > number:
                return  # late: a newer one has begun
            if file.number < number:
                file.number, file.whole = number, False
                kept_image.write(file.descriptor, size, [])
            if piece is not None:
                offset, data = piece
                kept_image.write_at(file.descriptor, offset, data.numpy().data)
                return
            file.whole = True
            ready = [reply for wanted, reply in file.waiting if wanted <= number]
            file.waiting = [(wanted, reply) for wanted, reply in file.waiting if wanted > number]
        for reply in ready:
            reply.set_result(file.at)

    def stored(self, pipeline: str, of: str, number: int) -> Future[Any]:
        """Return a future of where snapshot ``number`` of worker ``of`` lies here, once all of it has come."""
        reply: Future[Any] = Future()
        with self._lock:
            file = self._file(pipeline, of, number)
            whole = file.whole and file.number >= number
            if not whole:
                file.waiting.append((number, reply))
        if whole:
            reply.set_result(file.at)
        return reply

    def forget(self, pipeline: str, number: int) -> None:
        """Free the memory of the snapshots of ``pipeline`` up to ``number``."""
        with self._lock:
            for (owner, _, _), file in self._files.items():
                if owner == pipeline and file.number <= number:
                    os.ftruncate(file.descriptor, 0)
                    file.whole = False

    def drop(self, pipeline: str) -> None:
        """Forget ``pipeline``."""
        with self._lock:
            for key in [key for key in self._files if key[0] == pipeline]:
                del self._files[key]

    def _file(self, pipeline: str, of: str, number: int) -> _File:
        if (key := (pipeline, of, number % 2)) not in self._files:
            self._files[key] = _File()
        return self._files[key]


class _Sending:
    """Sends the file ``source`` as a snapshot, the next piece once the one before has arrived."""

    def __init__(self, transport: Transport, what: tuple[str, str, int], to: str, source: int) -> None:
        self._transport, self._what, self._to = transport, what, to
        self._size = os.fstat(source).st_size
        self._pieces: Iterator[Piece] = kept_image.pieces(source)
        self._close = weakref.finalize(self, os.close, source)

    def next(self) -> None:
        piece = next(self._pieces, None)
        data = None if piece is None else (piece[0], torch.frombuffer(bytearray(piece[1]), dtype=torch.uint8))
        reply = self._transport.call(self._to, "store", *self._what, self._size, data)
        if piece is None:
            self._close()
        else:
            reply.add_done_callback(self._arrived)

    def _arrived(self, reply: Future[Any]) -> None:
        if reply.exception() is None:  # else whoever awaits the snapshot learns of the loss by itself
            self.next()
