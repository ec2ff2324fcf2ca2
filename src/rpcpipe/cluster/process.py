"""Worker processes on this host: start, listen to, end.

What a worker says on its control channel, what it prints and how it dies are one kind of thing
here: messages ``(kind, payload)``, as they also come from workers of other hosts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from io import FileIO
from typing import Any

import psutil

from rpcpipe.cluster.control_channel import Channel, Message
from rpcpipe.cluster.spawner import exit_words
from rpcpipe.cluster.template import Stdio, Surroundings, templates
from rpcpipe.cluster.worker_logs import Lines

# glibc returns freed blocks to the system and faults them in again at every step; a worker keeps
# them: 160 page faults instead of 18,000 a step (bench, single process, d = 512). The user's values win.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
_BLOCK = 1 << 16
# Whoever lost its parent is a child of the first process.
_INIT = 1

Reader = Callable[[], "list[Message] | None"]


def environment(threads: int) -> dict[str, str]:
    """What a worker's environment is when it starts: this process's, and what makes it compute well."""
    paths = dict.fromkeys(os.path.abspath(path) for path in sys.path)  # '' is the working directory
    return {
        **_ALLOCATOR,
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }


class WorkerProcess:
    """One worker process and the control channel to it. ``config`` is what ``rpcpipe.worker`` reads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.name: str = config["name"]
        self.host = socket.gethostname()
        self._oom_kills = _oom_kills()
        surroundings = Surroundings.now(environment(config["threads"]))
        ours, theirs = socket.socketpair()
        self._pipes = [_Pipe("out"), _Pipe("err")]
        stdio = Stdio(theirs, *(pipe.writing for pipe in self._pipes))
        self._child = templates.start(stdio, surroundings, config["timeout"])
        self.channel = Channel(ours, patient=False)
        self.channel.send("config", dict(config))

    @property
    def pid(self) -> int:
        return self._child.pid

    def send(self, kind: str, payload: Any = None) -> None:
        """Say something to the worker; a dead one does not hear it."""
        self.channel.send(kind, payload)

    def sources(self) -> dict[int, Reader]:
        """What to watch: by file descriptor, a reader of what is there; it gives None at the end."""
        return {
            self._child.pidfd.fileno(): self._read_death,
            self.channel.fileno(): self._read_channel,
            **{pipe.fd: pipe.read for pipe in self._pipes},
        }

    def _read_channel(self) -> list[Message] | None:
        try:
            return self.channel.receive()
        except (EOFError, ValueError):
            return None  # that it died is for the pidfd to say

    def _read_death(self) -> list[Message]:
        last = [message for pipe in self._pipes for message in pipe.rest()]
        return [*last, ("died", self._death())]

    def _death(self) -> str:
        """How the process ended, in words."""
        code, more = self._child.wait()
        words = exit_words(code) + more
        if -code == signal.SIGKILL and _oom_kills() > self._oom_kills:
            free = psutil.virtual_memory().available / 2**30
            words += f" (the kernel has just killed a process for want of memory; {free:.1f} GiB are free now)"
        return words

    def state(self) -> str:
        """What the system says of a process that does not answer."""
        try:
            status = psutil.Process(self.pid).status()
        except psutil.Error:
            return "it is gone"
        return {
            psutil.STATUS_STOPPED: "it is stopped: SIGSTOP, or a debugger",
            psutil.STATUS_RUNNING: "it runs, but some call does not let go of the GIL",
            psutil.STATUS_SLEEPING: "it sleeps in a call that does not let go of the GIL",
        }.get(status, f"its state is {status}")

    def stopped(self) -> bool:
        """Is it stopped now, by SIGSTOP or a debugger?"""
        try:
            return bool(psutil.Process(self.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
        except psutil.Error:
            return False

    def kill(self) -> None:
        """SIGKILL; harmless if it is dead."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._child.pidfd.fileno(), signal.SIGKILL)

    def close(self) -> None:
        """Reap the (dying) process and let go of everything."""
        self._child.close()
        for pipe in self._pipes:
            pipe.file.close()
        self.channel.close()


class _Pipe:
    """A worker's stdout or stderr, and until it has started the end that it writes to."""

    def __init__(self, stream: str) -> None:
        self.fd, writing = os.pipe()
        self.file, self.writing = FileIO(self.fd), FileIO(writing, "w")
        self._stream = stream
        self._lines = Lines()
        # Children of the worker may hold its end open: a read must never wait for it.
        os.set_blocking(self.fd, False)

    def read(self) -> list[Message] | None:
        try:
            data = os.read(self.fd, _BLOCK)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        return self._messages(self._lines.feed(data)) if data else None

    def rest(self) -> list[Message]:
        """Everything still in the pipe, an unfinished line included."""
        found: list[Message] = []
        while messages := self.read():
            found += messages
        return found + self._messages(self._lines.end())

    def _messages(self, lines: list[str]) -> list[Message]:
        return [("log", [self._stream, line]) for line in lines]


def _oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started."""
    try:
        with open("/proc/vmstat") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


def leftovers() -> list[psutil.Process]:
    """Worker processes of this user whose driver is gone."""
    found = []
    for process in psutil.process_iter(["cmdline", "uids", "ppid"]):
        info = process.info
        mine = info["uids"] is not None and info["uids"].real == os.getuid()
        if mine and "rpcpipe.worker" in (info["cmdline"] or []) and info["ppid"] == _INIT:
            found.append(process)
    return found
