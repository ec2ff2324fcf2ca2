"""Who may save into a directory, while others do, have done or only say that they do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rpcpipe.checkpoint import lock
from rpcpipe.errors import CheckpointError

HOLDER = """
import sys
from pathlib import Path
from rpcpipe.checkpoint import lock
lock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that saves into ``directory``; ``stdin.close()`` ends it."""
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def owner_of(directory: Path) -> Any:
    return json.loads((directory / lock.LOCK).read_text())


def write(directory: Path, **changes: Any) -> None:
    known = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time(), "since": time.time()}
    (directory / lock.LOCK).write_text(json.dumps(known | changes))


def test_another_process_that_saves_there_is_named_and_its_lock_ends_with_it(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(
            CheckpointError, match=f"process {process.pid} on {socket.gethostname()} saves to {tmp_path}"
        ):
            lock.acquire(tmp_path)
        assert owner_of(tmp_path)["pid"] == process.pid
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
    assert not (tmp_path / lock.LOCK).exists()
    lock.acquire(tmp_path)
    lock.acquire(tmp_path)
    assert owner_of(tmp_path)["pid"] == os.getpid()


def test_the_lock_of_a_killed_process_is_taken_over_also_if_its_number_is_used_again(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait(10)
        assert owner_of(tmp_path)["pid"] == process.pid
        lock.acquire(tmp_path)
    assert owner_of(tmp_path)["pid"] == os.getpid()
    write(tmp_path, pid=os.getppid(), started=1.0)
    lock.acquire(tmp_path)
    assert owner_of(tmp_path)["pid"] == os.getpid()


def test_a_lock_made_meanwhile_is_not_removed_as_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, started=1.0)
    [stale], read = [lock._read(tmp_path / lock.LOCK)], lock._read
    with holder_after_stale_look(tmp_path, monkeypatch, stale), pytest.raises(CheckpointError, match="on elsewhere"):
        lock.acquire(tmp_path)
    monkeypatch.setattr(lock, "_read", read)
    assert owner_of(tmp_path)["host"] == "elsewhere"


@contextmanager
def holder_after_stale_look(directory: Path, monkeypatch: pytest.MonkeyPatch, stale: Any) -> Iterator[None]:
    """The first look finds ``stale``; by the second one another process has taken the lock."""
    read, looks = lock._read, iter([stale])
    write(directory, host="elsewhere")
    monkeypatch.setattr(lock, "_read", lambda path: next(looks, None) or read(path))
    yield


def test_a_lock_of_another_host_is_left_to_the_user(tmp_path: Path) -> None:
    write(tmp_path, host="elsewhere", pid=4711)
    with pytest.raises(
        CheckpointError, match=r"process 4711 on elsewhere saves .* or if it has ended, delete .*lock\."
    ):
        lock.acquire(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"host": 1}', "9" * 5000, "[" * 100_000])
def test_what_is_no_lock_is_named(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PAUSE", 0.0)
    (tmp_path / lock.LOCK).write_text(content)
    with pytest.raises(CheckpointError, match=f"{lock.LOCK} is no lock of rpcpipe; if no other"):
        lock.acquire(tmp_path)
    (tmp_path / lock.LOCK).unlink()
    os.mkfifo(tmp_path / lock.LOCK)
    with pytest.raises(CheckpointError, match=f"{lock.LOCK} is no lock of rpcpipe; if no other"):
        lock.acquire(tmp_path)
