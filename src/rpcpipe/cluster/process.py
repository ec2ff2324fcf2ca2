"""Start, hear and end worker processes on this host.

What a worker sends on its control channel, what it prints and how it dies are all messages
``(kind, payload)`` here, as they also come from workers of other hosts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from typing import Any

import psutil

from rpcpipe.cluster.control_channel import Channel, Message
from rpcpipe.cluster.kept_descriptor import KeptDescriptor
from rpcpipe.cluster.spawner import describe_exit
from rpcpipe.cluster.template import Stdio, Surroundings, templates
from rpcpipe.cluster.worker_logs import Lines

# glibc returns freed blocks to the system and faults them in again at every step; a worker keeps
# them: 160 page faults instead of 18,000 a step (bench, single process, d = 512). The user's values win.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
_BLOCK = 1 << 16
# Orphaned processes are re-parented to PID 1.
_INIT = 1

Reader = Callable[[], "list[Message] | None"]


def strings(values: Sequence[Any]) -> list[str]:
    """Return the entries of ``sys.path`` or ``sys.argv`` that are strings or paths, as strings."""
    return [os.fsdecode(value) for value in values if isinstance(value, (str, bytes, os.PathLike))]


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment that a worker starts with: this process's, and what makes ``threads`` compute well."""
    paths = dict.fromkeys(os.path.abspath(path) for path in strings(sys.path))  # '' is the working directory
    return {
        **_ALLOCATOR,
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }


class WorkerProcess:
    """One worker process and the control channel to it. ``config`` is what ``rpcpipe.worker.main`` reads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.name: str = config["name"]
        self.host = self.domain = socket.gethostname()
        self._oom_kills = _oom_kills()
        surroundings = Surroundings.now(worker_environment(config["threads"]))
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
        """Send a message to the worker. Does not raise for a dead one."""
        self.channel.send(kind, payload)

    def readers(self) -> dict[int, Reader]:
        """Return what to watch: the process, the channel and the two pipes."""
        return {
            self._child.pidfd.fileno(): self._read_death,
            self.channel.fileno(): self._read_channel,
            **{pipe.fd: pipe.read for pipe in self._pipes},
        }

    def _read_channel(self) -> list[Message] | None:
        try:
            return self.channel.receive()
        except (EOFError, ValueError):
            return None  # its death is reported by the pidfd

    def _read_death(self) -> list[Message]:
        last = [message for pipe in self._pipes for message in pipe.drain()]
        return [*last, ("died", self._death())]

    def _death(self) -> str:
        """Describe how the process ended."""
        code, more = self._child.wait()
        description = describe_exit(code) + more
        if -code == signal.SIGKILL and _oom_kills() > self._oom_kills:
            free = psutil.virtual_memory().available / 2**30
            description += f" (the kernel has just killed a process for want of memory; {free:.1f} GiB are free now)"
        return description

    @property
    def home_lives(self) -> bool:
        """Return True: it is this process that could start another one."""
        return True

    def fence(self) -> None:
        """Do nothing: the kernel says when a process of this host has ended."""

    def keep(self, pid: int, descriptor: int) -> KeptDescriptor:
        """Keep number ``descriptor`` of the process ``pid``, which is this one, open here; OSError if it has ended."""
        return KeptDescriptor(pid, descriptor)

    def state(self) -> str:
        """Describe what the system says about the process, which does not answer."""
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
        """Return whether the process is stopped now, by SIGSTOP or a debugger."""
        try:
            return bool(psutil.Process(self.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
        except psutil.Error:
            return False

    def kill(self) -> None:
        """Send SIGKILL; harmless if the process is dead."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._child.pidfd.fileno(), signal.SIGKILL)

    def dismiss(self) -> None:
        """Do as ``close``: nobody but the process itself is to end."""
        self.close()

    def close(self) -> None:
        """Reap the process, which is dead or dying, and close everything."""
        self._child.close()
        for pipe in self._pipes:
            pipe.file.close()
        self.channel.close()


class _Pipe:
    """A worker's stdout or stderr. ``writing``: the worker's end, until it has started."""

    def __init__(self, stream: str) -> None:
        self.fd, writing = os.pipe()
        self.file, self.writing = FileIO(self.fd), FileIO(writing, "w")
        self._stream = stream
        self._lines = Lines()
        # Children of the worker may hold the writing end open: a read must never wait.
        os.set_blocking(self.fd, False)

    def read(self) -> list[Message] | None:
        try:
            data = os.read(self.fd, _BLOCK)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        return self._messages(self._lines.feed(data)) if data else None

    def drain(self) -> list[Message]:
        """Return all that is left in the pipe, an unfinished line included."""
        drained: list[Message] = []
        while messages := self.read():
            drained += messages
        return drained + self._messages(self._lines.end())

    def _messages(self, lines: list[str]) -> list[Message]:
        return [("log", [self._stream, line]) for line in lines]


def _oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since it started."""
    try:
        with open("/proc/vmstat") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


def leftovers() -> list[psutil.Process]:
    """Return this user's worker processes whose driver is gone."""
    orphans = []
    for process in psutil.process_iter(["cmdline", "uids", "ppid"]):
        info = process.info
        own = info["uids"] is not None and info["uids"].real == os.getuid()
        if own and "rpcpipe.worker" in (info["cmdline"] or []) and info["ppid"] == _INIT:
            orphans.append(process)
    return orphans
