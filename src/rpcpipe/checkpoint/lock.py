"""One process at a time saves into a directory, from its first save there until it ends.

Two jobs in one directory would remove each other's drafts and old checkpoints. The lock is a file that names its owner.
That of a process of this host that has ended is taken over; whether one of another host lives cannot be known, so its
lock is left to the user.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from rpcpipe.checkpoint.files import read_text
from rpcpipe.errors import CheckpointError

LOCK = ".rpcpipe.lock"
# The clock that a process's start is counted from may have been set meanwhile (seconds).
_TOLERANCE = 2.0
# How often, and after how many seconds, a lock is looked at again that another process is about to write or remove.
_TRIES, _PAUSE = 20, 0.01
_held: set[Path] = set()


def acquire(directory: Path) -> None:
    """Make this process the one that saves into ``directory``, until it ends; nothing changes if it is already.

    Raises CheckpointError with the owner if another process is, and OSError if the lock cannot be written.
    """
    path = directory / LOCK
    for _ in range(_TRIES):
        if (owner := _read(path)) is None:
            if _create(path):
                _held.add(path)
                return
        elif _is_own(owner):
            return
        elif _may_live(owner):
            raise _refusal(directory, owner)
        else:
            _remove_stale(path)
        time.sleep(_PAUSE)
    raise CheckpointError(f"{path} comes and goes: several processes begin to save there; give each its own directory")


def _refusal(directory: Path, owner: dict[str, Any]) -> CheckpointError:
    host, since = owner["host"], time.strftime("%d %b %Y %H:%M:%S", time.localtime(owner["since"]))
    ended = "" if host == socket.gethostname() else f", or if it has ended, delete {directory / LOCK}"
    return CheckpointError(
        f"process {owner['pid']} on {host} saves to {directory} since {since}, and two jobs would delete each other's"
        f" checkpoints: save to another directory, end that process{ended}. Nothing was written"
    )


def _identity() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


@functools.cache  # the same value again, also if the clock is set
def _started(pid: int) -> float:
    return psutil.Process(pid).create_time()


def _is_own(owner: dict[str, Any]) -> bool:
    return all(owner[key] == value for key, value in _identity().items())


def _may_live(owner: dict[str, Any]) -> bool:
    """Return False if the owner was a process of this host and has ended; its number may have another one by now."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner["started"]) <= _TOLERANCE
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _read(path: Path) -> dict[str, Any] | None:
    """Return what the lock says, None if there is none; raises CheckpointError for a file that is none."""
    kinds = {"host": str, "pid": int, "started": float, "since": float}
    try:
        owner = json.loads(_written(path))
        if (
            {key: type(owner[key]) for key in kinds} == kinds
            and 0 < owner["pid"] < 1 << 31
            and 0 < owner["since"] < 1e11
        ):
            return dict(owner)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{path} is no lock of rpcpipe; if no other process saves to {path.parent}, delete it")


def _written(path: Path) -> str:
    """Return the lock's text, once there is some: it is written right after it appears."""
    for _ in range(_TRIES):
        if text := read_text(path):
            return text
        time.sleep(_PAUSE)
    return ""


def _create(path: Path) -> bool:
    """Write the lock; return False if another process was faster."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, json.dumps({**_identity(), "since": time.time()}).encode())
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    return True


def _remove_stale(path: Path) -> None:
    """Remove the lock of a process that has ended, unless another process of this host does so now."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # All that find the lock stale are on this host. Looked at again, else a lock made meanwhile would go.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = _read(path)
        if owner is not None and not _may_live(owner):
            path.unlink()
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


@atexit.register
def _release() -> None:
    """Remove the locks of this process; a fork has its parent's list and owns none of them."""
    for path in _held:
        try:
            if (owner := _read(path)) is not None and _is_own(owner):
                path.unlink()
        except (OSError, CheckpointError):
            pass  # the file system is gone; a stale lock is taken over
