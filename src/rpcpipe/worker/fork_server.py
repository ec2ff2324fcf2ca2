"""The template process's loop: it forks workers and reports their exit statuses.

The template has one thread, runs no operation of torch and does not initialize CUDA: neither a pool of threads nor
a CUDA context survives a fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch

from rpcpipe.cluster.spawner import end_with_parent
from rpcpipe.cluster.template import PRELOADED, Surroundings
from rpcpipe.transport.listen_hook import entry_of_listen

_LONGEST = 1 << 12
# A request carries six descriptors: surroundings, directory, status pipe, and the three of Stdio.
_DESCRIPTORS = 6


def serve(connection: socket.socket, work: Callable[[socket.socket], NoReturn]) -> NoReturn:
    """Fork one worker per request, which runs ``work(control socket)``, until the driver's end closes; then exit."""
    for name in PRELOADED:
        importlib.import_module(name)
    entry_of_listen()  # known to all children
    # Imported objects are never freed. Frozen, they are not touched by a child's collections, which would copy pages.
    gc.freeze()
    status = 0
    try:
        ForkServer(connection, work).run()
    except OSError:
        status = 1  # the driver has ended
    os._exit(status)


class ForkServer:
    """Serves fork requests. ``_children``: by pidfd, a worker's pid and the pipe that takes its exit status."""

    def __init__(self, connection: socket.socket, work: Callable[[socket.socket], NoReturn]) -> None:
        self._connection = connection
        self._work = work
        self._children: dict[int, tuple[int, int]] = {}
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def run(self) -> None:
        """Serve until the driver closes its end or dies."""
        refusal = _refusal()
        self._connection.send(f"refused {refusal}".encode() if refusal else b"ready")
        while not refusal:
            for fd, _ in self._poll.poll():
                if fd != self._connection.fileno():
                    self._reap(fd)
                elif not self._answer():
                    return

    def _answer(self) -> bool:
        """Fork a worker for the next request and send its pid and pidfd; return False once the driver's end closed."""
        data, fds, _, _ = socket.recv_fds(self._connection, _LONGEST, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        surroundings, directory, status, *stdio = fds
        template = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._connection.send(f"refused {error}".encode())
            _close(*fds)
            return True
        if pid == 0:
            self._become_worker(template, surroundings, directory, status, *stdio)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid, status
        self._poll.register(pidfd, select.POLLIN)
        _close(surroundings, directory, *stdio)
        socket.send_fds(self._connection, [f"forked {pid}".encode()], [pidfd])
        return True

    def _reap(self, pidfd: int) -> None:
        """Write the exit status of an ended worker to its status pipe."""
        pid, status = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            os.write(status, str(code).encode())
        except BrokenPipeError:
            pass  # the driver has closed the pipe
        _close(pidfd, status)

    def _become_worker(
        self, template: int, surroundings: int, directory: int, status: int, control: int, out: int, err: int
    ) -> NoReturn:
        try:
            os.setsid()  # Ctrl-C at the terminal must reach the driver only
            end_with_parent(template)
            self._connection.close()
            _close(status, *(fd for pidfd, (_, other) in self._children.items() for fd in (pidfd, other)))
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.fchdir(directory)
            with os.fdopen(surroundings) as file:
                Surroundings(**json.load(file)).adopt()
            _close(directory, out, err)
            _reseed()
            self._work(socket.socket(fileno=control))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)


def _refusal() -> str:
    """Return why this process must not fork; '' if it may."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "CUDA is initialized by what Python imports at its start"
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        return f"what Python imports at its start has made threads ({threads - 1})"
    return ""


def _reseed() -> None:
    """Seed torch's and NumPy's random numbers from the system; Python's are reseeded by the fork itself."""
    torch.default_generator.seed()
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
