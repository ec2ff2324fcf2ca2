"""Open files that others may have put there: regular ones only, so that nothing waits for a pipe or a device."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Yield a descriptor of the regular file ``path`` for reading.

    Raises OSError for a link, a pipe, a socket, a device or a folder, and for what cannot be opened.
    """
    # O_NONBLOCK: opening a pipe would else wait for its writer; for regular files it means nothing.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(f"it is no regular file ({stat.filemode(mode)}): a checkpoint's files are plain files")
        yield descriptor
    finally:
        os.close(descriptor)


def read_text(path: Path) -> str:
    """Return the text of the regular file ``path``; raises OSError as ``opened`` does, ValueError for other text."""
    with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        return file.read().decode()


def sync(path: Path) -> None:
    """Write the file or folder ``path`` through to the disk; return once it is there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
