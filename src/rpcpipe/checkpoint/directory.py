"""Where checkpoints lie: complete folders that appear and disappear in one rename each.

``directory/00007-step-000123`` is the seventh save, after 123 training steps. A checkpoint is written
into a hidden sibling and renamed once all of it is on the disk; an old one is renamed before it is
deleted. So whatever is killed when, a folder of this name is complete, and the newest is the one
of the highest number.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rpcpipe.errors import CheckpointError, RpcPipeError

MANIFEST = "checkpoint.json"
_NAME = re.compile(r"(\d{5,})-step-\d{6,}")
_HIDDEN = ".rpcpipe-"


@contextmanager
def draft(directory: Path) -> Iterator[Path]:
    """A new folder in ``directory`` to write a checkpoint into; gone afterwards unless it was published.

    Raises CheckpointError where the file system refuses.
    """
    path = directory / f"{_HIDDEN}{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _clean(directory)
        path.mkdir()
        yield path
    except RpcPipeError:  # of which some are OSErrors too
        raise
    except OSError as error:
        raise CheckpointError(
            f"the driver cannot save to {directory}: {error}; checkpoints there are as before"
        ) from error
    finally:
        # A worker that still writes may make this fail: then the next save cleans up.
        shutil.rmtree(path, ignore_errors=True)


def publish(path: Path, step: int) -> Path:
    """Give the complete draft ``path`` its name; returns it."""
    directory = path.parent
    number = max(_published(directory), default=0) + 1
    sync(path)
    # The name is new, so this replaces nothing. Two drivers that save to one directory collide here.
    final = path.rename(directory / f"{number:05}-step-{step:06}")
    sync(directory)
    sync(directory.parent)
    return final


def prune(directory: Path, keep: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints; None keeps them all. Raises CheckpointError."""
    found = _published(directory)
    try:
        for number in sorted(found)[: -keep if keep is not None else 0]:
            found[number].rename(directory / f"{_HIDDEN}{uuid.uuid4().hex}")
    except OSError as error:
        raise CheckpointError(f"the new checkpoint is saved, but an old one cannot be removed: {error}") from error
    _clean(directory)


def newest(directory: Path) -> Path:
    """The checkpoint ``directory`` itself, or the newest one in it; raises CheckpointError if there is none."""
    if (directory / MANIFEST).exists():
        return directory
    found = _published(directory) if directory.is_dir() else {}
    if not found:
        raise CheckpointError(f"no checkpoint in {directory}: neither {MANIFEST} nor a folder like 00001-step-000100")
    return found[max(found)]


def sync(path: Path) -> None:
    """Return when the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _published(directory: Path) -> dict[int, Path]:
    matches = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _clean(directory: Path) -> None:
    """Delete what killed or failed saves have left."""
    for path in directory.glob(f"{_HIDDEN}*"):
        shutil.rmtree(path, ignore_errors=True)
