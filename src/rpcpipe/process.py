"""Worker processes on this host: start, listen to, end.

What a worker says on its control channel, what it prints and how it dies are one kind of thing
here: messages ``(kind, payload)``, as they also come from workers of other hosts.
"""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import psutil

from rpcpipe.channel import Channel, Message
from rpcpipe.logs import Lines

# The environment variable that names the inherited control socket.
CONTROL_FD = "RPCPIPE_CONTROL_FD"

# glibc returns freed blocks to the system and faults them in again at every step; a worker keeps
# them: 160 page faults instead of 18,000 a step (bench, single process, d = 512). The user's values win.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
_BLOCK = 1 << 16
# Whoever lost its parent is a child of the first process.
_INIT = 1

Reader = Callable[[], "list[Message] | None"]


class WorkerProcess:
    """One spawned worker and the control channel to it. ``config`` is what ``rpcpipe.worker`` reads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.name: str = config["name"]
        self.host = socket.gethostname()
        self._oom_kills = _oom_kills()
        ours, theirs = socket.socketpair()
        env = {
            **_ALLOCATOR,
            **os.environ,
            CONTROL_FD: str(theirs.fileno()),
            "OMP_NUM_THREADS": str(config["threads"]),
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONUNBUFFERED": "1",
        }
        with theirs:
            # A session of its own: Ctrl-C at the terminal is the driver's alone.
            self.popen = _spawner.call(
                lambda: subprocess.Popen(
                    [sys.executable, "-W", "ignore:Failed to initialize NumPy", "-m", "rpcpipe.worker"],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            )
        self.channel = Channel(ours, patient=False)
        self._pidfd = os.pidfd_open(self.popen.pid)
        self._pipes = [_Pipe(self.popen.stdout, "out"), _Pipe(self.popen.stderr, "err")]
        self.channel.send("config", dict(config))

    @property
    def pid(self) -> int:
        return int(self.popen.pid)

    def send(self, kind: str, payload: Any = None) -> None:
        """Say something to the worker; a dead one does not hear it."""
        self.channel.send(kind, payload)

    def sources(self) -> dict[int, Reader]:
        """What to watch: by file descriptor, a reader of what is there; it gives None at the end."""
        return {
            self._pidfd: self._read_death,
            self.channel.fileno(): self._read_channel,
            **{pipe.fd: pipe.read for pipe in self._pipes},
        }

    def _read_channel(self) -> list[Message] | None:
        try:
            return self.channel.receive()
        except (EOFError, ValueError):
            return None  # that it died is for the pidfd to say

    def _read_death(self) -> list[Message]:
        self.popen.wait()
        last = [message for pipe in self._pipes for message in pipe.rest()]
        return [*last, ("died", self._death())]

    def _death(self) -> str:
        """How the process ended, in words."""
        code = self.popen.returncode
        if code >= 0:
            return f"exited with status {code}"
        words = f"was killed by {signal.Signals(-code).name}"
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
        self.popen.kill()

    def close(self) -> None:
        """Reap the (dying) process and let go of everything."""
        self.popen.wait()
        for pipe in self._pipes:
            pipe.file.close()
        os.close(self._pidfd)
        self.channel.close()


class _Pipe:
    """A worker's stdout or stderr."""

    def __init__(self, file: Any, stream: str) -> None:
        self.file = file
        self.fd: int = file.fileno()
        self._stream = stream
        self._lines = Lines()
        # Children of the worker may hold its end open: a read must never wait for it.
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) | os.O_NONBLOCK)

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


class _Spawner:
    """Starts processes from one thread that lives as long as this process.

    Workers ask the kernel to be killed with the thread that started them (PR_SET_PDEATHSIG): only
    the kernel can end one that is stopped or holds its GIL when the driver dies.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._owner: tuple[int, threading.Thread] | None = None

    def call(self, job: Callable[[], Any]) -> Any:
        if self._owner is None or self._owner[0] != os.getpid():  # a fork has no threads but its own
            thread = threading.Thread(target=self._run, daemon=True, name="rpcpipe-spawner")
            self._owner = os.getpid(), thread
            thread.start()
        done: Future[Any] = Future()
        self._jobs.put((done, job))
        return done.result()

    def _run(self) -> None:
        while True:
            done, job = self._jobs.get()
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)


_spawner = _Spawner()


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
