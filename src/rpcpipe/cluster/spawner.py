"""Processes started by this one, from one thread that lives as long as it does.

Children ask the kernel to be killed with the thread that started them (PR_SET_PDEATHSIG): only the
kernel can end one that is stopped or holds its GIL when the driver dies.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from io import FileIO
from typing import Any, Protocol

_PR_SET_PDEATHSIG = 1
# No garbage is collected while modules are imported, which takes a sixth of the time; `worker.work` turns it on.
_PROGRAM = "import gc; gc.disable(); from rpcpipe.worker.main import main; main()"
# The import of torch warns where numpy is not installed; no worker needs it. -P: the module path is PYTHONPATH's,
# which is the driver's, and not the working directory before it. The last word is for who reads process lists.
_COMMAND = ["-P", "-W", "ignore:Failed to initialize NumPy", "-c", _PROGRAM, "rpcpipe.worker"]


class Child(Protocol):
    """A worker process, whoever its parent is. ``pidfd`` becomes readable when it has ended."""

    pid: int
    pidfd: FileIO

    def wait(self) -> tuple[int, str]:
        """Its exit status, negative for a signal, and words to add; waits for its end and reaps it."""
        ...

    def close(self) -> None:
        """Reap it, which must be dead or dying, and let go of its descriptors."""
        ...


class SpawnedChild:
    """A worker started as a Python process of its own."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self.pid = popen.pid
        self.pidfd = FileIO(os.pidfd_open(popen.pid))

    def wait(self) -> tuple[int, str]:
        return self._popen.wait(), ""

    def close(self) -> None:
        self._popen.wait()
        self.pidfd.close()


def popen(env: Mapping[str, str], *, stdout: int, stderr: int, pass_fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """A Python process that runs ``rpcpipe.worker.main.main``; to be called on the spawner's thread."""
    return subprocess.Popen(
        [sys.executable, *_COMMAND],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        # A session of its own: Ctrl-C at the terminal is the driver's alone.
        start_new_session=True,
    )


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; ``parent`` is whose thread that is."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def exit_words(code: int) -> str:
    """How a process ended, from its exit status as ``subprocess`` gives it."""
    return f"exited with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


class Spawner:
    """Runs jobs on the one thread that starts processes. What it was doing is finished whoever is interrupted."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._owner: tuple[int, threading.Thread] | None = None

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """``job()`` on the thread, after what was submitted before."""
        if self._owner is None or self._owner[0] != os.getpid():  # a fork has no threads but its own
            self._jobs = queue.SimpleQueue()
            thread = threading.Thread(target=self._run, args=(self._jobs,), daemon=True, name="rpcpipe-spawner")
            self._owner = os.getpid(), thread
            thread.start()
        done: Future[Any] = Future()
        self._jobs.put((done, job))
        return done

    def call(self, job: Callable[[], Any]) -> Any:
        """``submit`` and wait for the result. Bounded by the job, which has a deadline of its own."""
        return self.submit(job).result()

    @staticmethod
    def _run(jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]) -> None:
        while True:
            done, job = jobs.get()
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)
            del done, job  # an interrupted caller has dropped them: so ends what they own


spawner = Spawner()
