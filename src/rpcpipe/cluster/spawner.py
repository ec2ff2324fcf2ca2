"""Start processes, all from one thread that lives as long as this process.

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
# which is the driver's, and not the working directory before it. The last argument is there for process lists.
_COMMAND = ["-P", "-W", "ignore:Failed to initialize NumPy", "-c", _PROGRAM, "rpcpipe.worker"]


class Child(Protocol):
    """A worker process, a child of this one or of a template. ``pidfd`` becomes readable when it has ended."""

    pid: int
    pidfd: FileIO

    def wait(self) -> tuple[int, str]:
        """Wait for its end and reap it; return its exit status, negative for a signal, and what to add to a message."""
        ...

    def close(self) -> None:
        """Reap it, which must be dead or dying, and close its descriptors."""
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
    """Start a Python process that runs ``rpcpipe.worker.main.main``. To be called on the spawner's thread."""
    return subprocess.Popen(
        [sys.executable, *_COMMAND],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        # In another session: Ctrl-C at the terminal goes to the driver alone.
        start_new_session=True,
    )


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it, of process ``parent``, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def describe_exit(code: int) -> str:
    """Describe how a process ended; ``code`` is its exit status as ``subprocess`` gives it."""
    return f"exited with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


class Spawner:
    """Runs jobs on the one thread that starts processes. A job is finished although its caller is interrupted."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._owner: tuple[int, threading.Thread] | None = None

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Run ``job()`` on the thread, after what was submitted before; return the future of its result."""
        if self._owner is None or self._owner[0] != os.getpid():  # a fork does not inherit the thread
            self._jobs = queue.SimpleQueue()
            thread = threading.Thread(target=self._run, args=(self._jobs,), daemon=True, name="rpcpipe-spawner")
            self._owner = os.getpid(), thread
            thread.start()
        done: Future[Any] = Future()
        self._jobs.put((done, job))
        return done

    def call(self, job: Callable[[], Any]) -> Any:
        """Run ``job()`` on the thread; return its result. The job's own deadline bounds the wait."""
        return self.submit(job).result()

    @staticmethod
    def _run(jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]) -> None:
        while True:
            done, job = jobs.get()
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)
            del done, job  # an interrupted caller has dropped them: what they own is freed here


spawner = Spawner()
