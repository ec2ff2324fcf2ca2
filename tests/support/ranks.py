"""Ranks of ``rp.connect`` on this host, each with an agent of its own; this process is the driver."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil

import rpcpipe as rp
from support.faults import wait_for

SECRET = "a secret of the tests"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def popen(stack: ExitStack, command: list[str], environ: Mapping[str, str | None]) -> subprocess.Popen[str]:
    """Start a process that is gone once ``stack`` is left; a variable that is None is not set."""
    env = {key: value for key, value in environ.items() if value is not None}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def worker_of(rank: subprocess.Popen[str]) -> psutil.Process:
    """The worker that the rank's agent has forked from its template."""
    [template] = psutil.Process(rank.pid).children()
    [worker] = template.children()
    return worker


class Ranks:
    """The agents by rank, of which one after the other may have a rank."""

    def __init__(self, stack: ExitStack, world: int) -> None:
        self._stack = stack
        self._environ = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RPCPIPE_SECRET": SECRET,
            "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        self.agents: dict[int, subprocess.Popen[str]] = {}

    def start(self, rank: int, **changes: str) -> subprocess.Popen[str]:
        environ = {**self._environ, "RANK": str(rank), **changes}
        self.agents[rank] = started = popen(self._stack, [sys.executable, "-m", "rpcpipe.worker"], environ)
        return started

    def connect(self, **arguments: Any) -> rp.Cluster:
        """Be the driver of these ranks."""
        before = dict(os.environ)
        os.environ.update(self._environ, RANK="0")
        try:
            return rp.connect(timeout=60.0, **arguments)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def kill(self, cluster: rp.Cluster, rank: int) -> None:
        """Kill the agent, as its host's death would, and wait until it has been noticed."""
        seen = len(cluster.events)
        self.agents.pop(rank).kill()
        wait_for(lambda: len(cluster.events) > seen)

    def close(self) -> None:
        """See all agents end in peace, once their driver has closed, but for those that were killed."""
        assert {rank: agent.wait(20) for rank, agent in self.agents.items()} == dict.fromkeys(self.agents, 0)

    def freeze(self, rank: int) -> list[psutil.Process]:
        """Let nothing come from the rank any more, without a word, as if its cable were pulled; return who is still."""
        worker = worker_of(self.agents[rank])
        still = [psutil.Process(self.agents[rank].pid), worker]
        for one in still:
            one.send_signal(signal.SIGSTOP)
        return still


@contextmanager
def ranks(world: int) -> Iterator[Ranks]:
    """Agents of ranks 1 to ``world`` - 1, gone afterwards."""
    with ExitStack() as stack:
        made = Ranks(stack, world)
        for rank in range(1, world):
            made.start(rank)
        yield made
