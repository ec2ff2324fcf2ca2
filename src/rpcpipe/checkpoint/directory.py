"""The directory of checkpoints: complete folders, each of which appears and disappears by one rename.

``directory/00007-step-000123`` is the seventh save, after 123 training steps. A checkpoint is written
into a hidden sibling folder and renamed once all its files are on the disk; an old checkpoint is renamed
before it is deleted. Invariant: a folder with such a name is complete, whichever process is killed at
whatever time, and the newest checkpoint has the highest number.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rpcpipe.checkpoint import lock
from rpcpipe.checkpoint.files import sync
from rpcpipe.errors import CheckpointError, RpcPipeError

MANIFEST = "checkpoint.json"
_NAME = re.compile(r"(\d{5,})-step-\d{6,}")
_HIDDEN = ".rpcpipe-"


@contextmanager
def draft(directory: Path) -> Iterator[Path]:
    """Yield a new folder in ``directory`` to write a checkpoint into; delete it afterwards unless it was published.

    From then on no other process saves to ``directory`` until this one ends. Raises CheckpointError for a directory
    that another process saves to, and for an error of the file system.
    """
    path = directory / f"{_HIDDEN}{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(directory)
        _clean(directory)
        path.mkdir()
        yield path
    except RpcPipeError:  # some of these are OSErrors, too
        raise
    except OSError as error:
        raise CheckpointError(
            f"the driver cannot save to {directory}: {error}; checkpoints there are as before"
        ) from error
    finally:
        # A worker that still writes may make the deletion fail; the next save then deletes the rest.
        shutil.rmtree(path, ignore_errors=True)


def publish(path: Path, step: int) -> Path:
    """Rename the complete draft ``path`` to a checkpoint of ``step`` training steps; return the new path."""
    directory = path.parent
    number = max(_published(directory), default=0) + 1
    sync(path)
    # The name is new, so the rename replaces nothing, even if another process has broken the lock.
    final = path.rename(directory / f"{number:05}-step-{step:06}")
    sync(directory)
    sync(directory.parent)
    return final


def prune(directory: Path, keep: int | None) -> None:
    """Delete all checkpoints except the newest ``keep``; None keeps all. Raises CheckpointError."""
    checkpoints = _published(directory)
    try:
        for number in sorted(checkpoints)[: -keep if keep is not None else 0]:
            checkpoints[number].rename(directory / f"{_HIDDEN}{uuid.uuid4().hex}")
    except OSError as error:
        raise CheckpointError(f"the new checkpoint is saved, but an old one cannot be removed: {error}") from error
    _clean(directory)


def newest(directory: Path) -> Path | None:
    """Return ``directory`` if it is a checkpoint, else the newest checkpoint in it; None if there is none.

    Raises CheckpointError for what is no folder, and for one that cannot be looked into.
    """
    try:
        if os.path.lexists(directory / MANIFEST):
            return directory
        checkpoints = _published(directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be looked into for checkpoints: {error}") from error
    return checkpoints[max(checkpoints)] if checkpoints else None


def _published(directory: Path) -> dict[int, Path]:
    """Return the checkpoints in ``directory`` by their numbers."""
    matches = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return {int(match[1]): path for match, path in matches if match and path.is_dir()}


def _clean(directory: Path) -> None:
    """Delete the hidden folders that killed or failed saves have left."""
    for path in directory.glob(f"{_HIDDEN}*"):
        shutil.rmtree(path, ignore_errors=True)
