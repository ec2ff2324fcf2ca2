"""Copies of kept memory, for the day when its host is lost: the values between two steps, and nothing to take back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

_PIECE = 4 << 20  # bytes; a handler copies one at a time

Piece = tuple[int, bytes]  # an offset, and what is there


def pieces(descriptor: int) -> Iterator[Piece]:
    """Yield what the file ``descriptor`` has been written with, but for its holes."""
    place, size = 0, os.fstat(descriptor).st_size
    while place < size:
        try:
            place = os.lseek(descriptor, place, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # a hole up to the end
        end = os.lseek(descriptor, place, os.SEEK_HOLE)
        while place < end:
            data = os.pread(descriptor, min(_PIECE, end - place), place)
            yield place, data
            place += len(data)


def write(descriptor: int, size: int, parts: Iterable[tuple[int, bytes | memoryview]]) -> None:
    """Let the file ``descriptor`` be ``size`` bytes long, holes but for ``parts``."""
    os.ftruncate(descriptor, 0)
    os.ftruncate(descriptor, size)
    for offset, data in parts:
        write_at(descriptor, offset, data)


def write_at(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` at ``offset``."""
    left = memoryview(data)
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def copied(path: str) -> int:
    """Return the descriptor of a copy of the file ``path``, in anonymous memory."""
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        copy = os.memfd_create("rpcpipe", os.MFD_CLOEXEC)
        write(copy, os.fstat(source).st_size, pieces(source))
        return copy
    finally:
        os.close(source)
