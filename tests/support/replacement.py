"""A cluster of a test's own whose workers die, and what must hold once they are replaced."""

from __future__ import annotations

import os
import signal
from contextlib import closing

import rpcpipe as rp
from support.faults import wait_for
from support.models import batches, cross_entropy, mlp, sgd
from support.oracle import Oracle, assert_same_weights


def counts() -> tuple[int, int]:
    """Descriptors and threads of the process that runs this."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def pids(cluster: rp.Cluster) -> list[int]:
    """What the workers themselves say."""
    return [cluster.call(worker, os.getpid) for worker in cluster.workers]


def kill(cluster: rp.Cluster, *indices: int) -> None:
    """Kill workers and wait until it has been noticed."""
    for index in indices:
        os.kill(cluster.workers[index].pid, signal.SIGKILL)
    names = [cluster.workers[index].name for index in indices]
    wait_for(lambda: {event.worker for event in cluster.events[-len(names) :]} == set(names))
    wait_for(lambda: not cluster.healthy)


def train_and_compare(cluster: rp.Cluster, steps: int = 2) -> None:
    """Train a new pipeline: the bits are one process's."""
    oracle = Oracle(mlp(), sgd, cross_entropy, 4)
    with closing(rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=4)) as pipe:
        for inputs, targets in batches(steps):
            assert pipe.train_step(inputs, targets).loss == oracle.train_step(inputs, targets)
        assert_same_weights(pipe, oracle.model)
