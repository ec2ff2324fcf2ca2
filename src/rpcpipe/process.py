"""Worker processes on this host: start, watch, end."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rpcpipe.errors import RendezvousError

# The environment variable that names the inherited control socket.
CONTROL_FD = "RPCPIPE_CONTROL_FD"

# glibc returns freed blocks to the system and faults them in again at every step; a worker keeps
# them: 160 page faults instead of 18,000 a step (bench, single process, d = 512). The user's values win.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


class WorkerProcess:
    """One spawned worker and the control channel to it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.name: str = config["name"]
        ours, theirs = socket.socketpair()
        env = {
            **_ALLOCATOR,
            **os.environ,
            CONTROL_FD: str(theirs.fileno()),
            "OMP_NUM_THREADS": str(config["threads"]),
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        with theirs:
            # A session of its own: Ctrl-C at the terminal is the driver's alone.
            self.popen = subprocess.Popen(
                [sys.executable, "-W", "ignore:Failed to initialize NumPy", "-m", "rpcpipe.worker"],
                env=env,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.control = ours
        self._lines = ours.makefile("r", encoding="utf-8")
        self.say(json.dumps(config))

    @property
    def pid(self) -> int:
        return self.popen.pid

    def say(self, word: str) -> None:
        """Send one line; a dead worker does not hear it."""
        try:
            self.control.sendall(f"{word}\n".encode())
        except OSError:
            pass  # the watch reports the death

    def expect(self, word: str, timeout: float) -> None:
        """Wait for ``word``; RendezvousError if the worker dies or is silent."""
        self.control.settimeout(timeout)
        try:
            heard = self._lines.readline().strip()
        except TimeoutError:
            raise RendezvousError(
                f"{self.name} (pid {self.pid}) did not report {word!r} within {timeout:g} s;"
                " the host may be overloaded: pass a larger timeout to rp.launch"
            ) from None
        if heard != word:
            self.popen.wait(timeout)
            raise RendezvousError(
                f"{self.name} (pid {self.pid}) {self.death()} while starting; its output above says why"
            )

    def close(self) -> None:
        """Let go of the control channel."""
        self._lines.close()
        self.control.close()

    def death(self) -> str:
        """How the process ended, in words."""
        code = self.popen.poll()
        if code is None:
            return "is alive"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with status {code}"


def end(processes: Sequence[WorkerProcess], timeout: float) -> None:
    """Ask all to stop, wait ``timeout`` seconds in all, kill what is left, reap everything."""
    for process in processes:
        process.say("stop")
    until = time.monotonic() + timeout
    for process in processes:
        try:
            process.popen.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.popen.kill()
    for process in processes:
        process.popen.wait()
        process.close()


class Watch:
    """Calls ``lost(process)`` within milliseconds of a worker's death, from a thread of its own."""

    def __init__(self, processes: Sequence[WorkerProcess], lost: Callable[[WorkerProcess], None]) -> None:
        self._lost = lost
        self._selector = selectors.DefaultSelector()
        wake, self._waker = os.pipe()
        self._selector.register(wake, selectors.EVENT_READ, None)
        for process in processes:
            self._selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, process)
        self._thread = threading.Thread(target=self._run, daemon=True, name="rpcpipe-watch")
        self._thread.start()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                self._selector.unregister(key.fd)
                os.close(key.fd)
                key.data.popen.wait()
                self._lost(key.data)

    def close(self) -> None:
        """Stop watching; deaths from here on are no news."""
        os.write(self._waker, b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()
        os.close(self._waker)
