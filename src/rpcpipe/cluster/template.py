"""Fork workers from a template: a process that has imported torch and runs nothing.

Importing torch costs 0.6 s of a core, forking a process that has done so a few milliseconds. A driver
(and every rank's agent) starts one template, with whatever decides how modules are imported; if that
changes, another one. Not multiprocessing's fork server: its children do not end with the driver
whatever state they are in, keep the server's environment and directory, and share one global server
with the user's own processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from io import FileIO
from typing import NamedTuple

from rpcpipe.cluster.spawner import Child, SpawnedChild, describe_exit, popen, spawner

# The environment variables that name the inherited sockets: a template's, and a spawned worker's.
TEMPLATE_FD, CONTROL_FD = "RPCPIPE_TEMPLATE_FD", "RPCPIPE_CONTROL_FD"

# Read while modules are imported or libraries loaded.
_READ_AT_IMPORT = (
    "ATEN_", "BLIS_", "C10_", "CUDA_", "DNNL_", "GLIBC_", "GOMP_", "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_",
    "NCCL_", "NVIDIA_", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTHON", "PYTORCH_", "TORCH_", "TRITON_",
)  # fmt: skip
# A pool of threads made by an import would be lost in the children, and its locks with it.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Imported by torch when the first optimizer is made, which takes as long as importing torch.
PRELOADED = ("torch._dynamo",)
_FORK_SECONDS = 5.0
_STATUS_SECONDS = 1.0
_OUTPUT = 1 << 12
_LIMITS = sorted(name for name in dir(resource) if name.startswith("RLIMIT_"))

log = logging.getLogger("rpcpipe")


class TemplateError(Exception):
    """A template cannot fork workers; the message says why."""


class Stdio(NamedTuple):
    """A worker's ends of its control socket and of the pipes that take its stdout and stderr.

    ``Templates.start`` closes them: a caller that is interrupted must not, while they are being passed on.
    """

    control: socket.socket
    out: FileIO
    err: FileIO

    def fds(self) -> list[int]:
        return [file.fileno() for file in self]

    def close(self) -> None:
        for file in self:
            file.close()


@dataclass(frozen=True)
class Surroundings:
    """What a spawned process would inherit, as it is at the moment of a launch."""

    env: dict[str, str]
    umask: int
    affinity: list[int]
    niceness: int
    limits: dict[str, list[int]]

    @classmethod
    def now(cls, env: Mapping[str, str]) -> Surroundings:
        """Return this thread's surroundings, with ``env`` as the environment."""
        with open("/proc/self/status") as lines:  # os.umask tells the mask only by changing it
            umask = next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), 0o022)
        limits = {name: list(resource.getrlimit(getattr(resource, name))) for name in _LIMITS}
        return cls(dict(env), umask, sorted(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0), limits)

    def adopt(self) -> None:
        """Apply them to this process, as far as it is allowed to."""
        os.environ.clear()
        os.environ.update(self.env)
        os.umask(self.umask)
        limits = [(getattr(resource, name), (soft, hard)) for name, (soft, hard) in self.limits.items()]
        changes = [
            partial(os.sched_setaffinity, 0, self.affinity),
            partial(os.setpriority, os.PRIO_PROCESS, 0, self.niceness),
            *(partial(resource.setrlimit, number, limit) for number, limit in limits),
        ]
        for change in changes:
            with contextlib.suppress(OSError, ValueError):
                change()


class Template:
    """The driver's end of a template process. For the spawner's thread alone, which nothing interrupts.

    The process ends when nothing refers to this object any more: ``Templates`` does, and every child, because
    children end with their parent.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._output = FileIO(os.memfd_create("rpcpipe-template"), "r+")
        fd = self._output.fileno()
        with theirs:
            environ = {**env, **_ONE_THREAD, TEMPLATE_FD: f"{theirs.fileno()} {os.getpid()}"}
            self._popen = popen(environ, stdout=fd, stderr=fd, pass_fds=[theirs.fileno()])
        self._socket = ours
        self._ready = False
        self.proven = False
        # Not at exit: the children would be killed before they are told to stop.
        self._end = weakref.finalize(self, _end, os.getpid(), self._popen, ours, self._output)
        self._end.atexit = False

    @property
    def pid(self) -> int:
        return self._popen.pid

    def state(self) -> str:
        """Describe how the process ended, or that it does not answer."""
        code = self._popen.poll()
        return "does not answer" if code is None else describe_exit(code)

    def fork(self, stdio: Stdio, surroundings: Surroundings, timeout: float) -> ForkedChild:
        """Fork a worker and return it. ``timeout``: seconds for a template that is still starting.

        Raises TemplateError. A late answer would be taken for the next request's, so this template must not be
        used again after that.
        """
        try:
            if not self._ready:
                self._socket.settimeout(timeout)
                self._answer()
                self._ready = True
            self._socket.settimeout(_FORK_SECONDS)
            status, theirs = (FileIO(fd, mode) for fd, mode in zip(os.pipe(), "rw", strict=True))
            with theirs:
                self._ask(stdio, surroundings, theirs.fileno())
            pid, (pidfd,) = self._answer()
        except (OSError, EOFError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):  # its end of the socket closes before it can be reaped
                self._popen.wait(0.0 if isinstance(error, TimeoutError) else _STATUS_SECONDS)
            output = os.pread(self._output.fileno(), _OUTPUT, 0).decode("utf-8", "replace").strip()
            last = f"; its last line: {output.splitlines()[-1]}" if output else ""
            raise TemplateError(f"the process to fork them from ({self.pid}) {self.state()}{last}") from error
        self.proven = True
        return ForkedChild(int(pid), FileIO(pidfd), status, self)

    def _ask(self, stdio: Stdio, surroundings: Surroundings, status: int) -> None:
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # As a file: an environment may be larger than any message.
            with FileIO(os.memfd_create("rpcpipe-surroundings"), "r+") as file:
                file.write(json.dumps(asdict(surroundings)).encode())
                file.seek(0)
                socket.send_fds(self._socket, [b"fork"], [file.fileno(), here, status, *stdio.fds()])
        finally:
            os.close(here)

    def _answer(self) -> tuple[str, list[int]]:
        data, fds, _, _ = socket.recv_fds(self._socket, _OUTPUT, 1, socket.MSG_CMSG_CLOEXEC)
        kind, _, text = data.decode().partition(" ")
        if kind == "refused":
            raise TemplateError(text)
        if not data:
            raise EOFError
        return text, list(fds)


def _end(owner: int, process: subprocess.Popen[bytes], *files: socket.socket | FileIO) -> None:
    for file in files:
        file.close()
    if os.getpid() == owner:  # a fork of the owner has the object, but is not the process's parent
        process.kill()
        process.wait()  # what is killed ends, if not in a system call that cannot be interrupted: then with that


class ForkedChild:
    """A worker forked from a template, whose child it is: the template reaps it and reports how it ended."""

    def __init__(self, pid: int, pidfd: FileIO, status: FileIO, template: Template) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._status = status
        self._template: Template | None = template
        self._ended: tuple[int, str] | None = None

    def wait(self) -> tuple[int, str]:
        if self._ended is None:
            _readable(self.pidfd, None)
            self._ended = self._read()
        return self._ended

    def _read(self) -> tuple[int, str]:
        if _readable(self._status, _STATUS_SECONDS) and (data := self._status.read(_OUTPUT)):
            return int(data), ""
        assert self._template is not None
        return -signal.SIGKILL, f" (the process it was forked from, {self._template.pid}, {self._template.state()})"

    def close(self) -> None:
        if self._template is not None:
            self.wait()
            self._template = None
        self.pidfd.close()
        self._status.close()


def _readable(file: FileIO, seconds: float | None) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


class Templates:
    """This process's template: started, and replaced if it has died or if what imports depend on has changed."""

    def __init__(self) -> None:
        self._owner = 0
        self._key: object = None
        self._template: Template | None = None
        self._useless: set[object] = set()

    def prepare(self, env: Mapping[str, str]) -> None:
        """Start the template for a launch that is about to come, and return at once."""
        spawner.submit(lambda: self._prepared(env))

    def start(self, stdio: Stdio, surroundings: Surroundings, timeout: float) -> Child:
        """Start a worker process: forked, or spawned where forking fails. Raises OSError where neither works."""

        def start() -> Child:
            try:
                return self._start(stdio, surroundings, timeout)
            finally:
                stdio.close()

        child: Child = spawner.call(start)
        return child

    def close(self) -> None:
        """End the template. The workers that were forked from it must have been closed."""
        if self._owner == os.getpid():
            self._template = None

    def _prepared(self, env: Mapping[str, str]) -> Template | None:
        if self._owner != os.getpid():
            self._owner, self._key, self._template = os.getpid(), None, None
        if (key := _import_key(env)) != self._key or self._template is None:
            self._key = key
            self._template = None if key in self._useless else Template(env)
        return self._template

    def _start(self, stdio: Stdio, surroundings: Surroundings, timeout: float) -> Child:
        while (template := self._prepared(surroundings.env)) is not None:
            try:
                return template.fork(stdio, surroundings, timeout)
            except TemplateError as error:
                self._template = None
                if not template.proven:
                    self._useless.add(self._key)
                    log.warning("workers are spawned, which takes longer than forking them: %s", error)
        control, out, err = stdio.fds()
        env = {**surroundings.env, CONTROL_FD: f"{control} {os.getpid()}"}
        return SpawnedChild(popen(env, stdout=out, stderr=err, pass_fds=[control]))


def _import_key(env: Mapping[str, str]) -> object:
    read = {**env, **_ONE_THREAD}
    return sys.executable, tuple(sorted(item for item in read.items() if item[0].startswith(_READ_AT_IMPORT)))


templates = Templates()
