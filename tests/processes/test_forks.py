"""A fork of the driver has its objects and none of its threads: what it does there must not reach the workers."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import rpcpipe as rp
from rpcpipe.errors import StateError
from support.models import adamw, batches, cross_entropy, mlp


def run_exit(_: Any) -> None:
    """What Python runs at exit: the atexit functions, and every finalizer."""
    import atexit

    atexit._run_exitfuncs()


def refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(StateError, match=words):
        call()


IN_THE_CHILD: dict[str, Callable[[rp.Pipeline], Any]] = {
    "exit": run_exit,
    "close the cluster": lambda pipe: pipe.cluster.close(),
    "close the pipeline": lambda pipe: pipe.close(),
    "collect": lambda pipe: (pipe.__dict__.clear(), gc.collect()),
    "call a stage": lambda pipe: refused(lambda: pipe.stages[0].call(str), "is a fork of the driver"),
    "use a handle": lambda pipe: refused(lambda: pipe.stages[0].forward(1), "is a fork of the driver"),
    "wait": lambda pipe: refused(lambda: pipe.cluster.transport.wait([], 1), "is a fork of the driver"),
    "replace": lambda pipe: refused(lambda: pipe.cluster.replace(1), "is a fork of the driver"),
    "train": lambda pipe: refused(lambda: pipe.train_step(*next(batches(1))), "is a fork of the driver"),
    "launch": lambda pipe: refused(lambda: rp.launch(workers=1), "is a fork of one that has had workers"),
}


@pytest.mark.parametrize("act", IN_THE_CHILD.values(), ids=IN_THE_CHILD)
def test_a_fork_leaves_its_parents_workers_alone(cluster: rp.Cluster, act: Callable[[rp.Pipeline], Any]) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=2)
    pipe.train_step(*next(batches(1)))
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act(pipe)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pipe.train_step(*next(batches(1))).applied
    pipe.close()


def test_a_fork_exits_and_the_driver_goes_on() -> None:
    script = """
import os, sys, torch, rpcpipe as rp
from torch import nn
if os.fork() == 0: sys.exit(0)  # before there are workers
layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
pipe = rp.Pipeline(layers, rp.launch(workers=2, threads=1), loss=nn.functional.mse_loss, chunks=2,
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
step = lambda: pipe.train_step(torch.ones(4, 4), torch.ones(4, 4))
step()
pid = os.fork()
if pid == 0: sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), step().applied)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["7", "True"], done.stderr
