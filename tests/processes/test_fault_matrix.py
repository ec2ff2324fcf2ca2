"""A fast part of ./benchmarks/run faults: every fault and every phase once or more; and what the matrix has not."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rpcpipe as rp
from rpcpipe.errors import WorkerLost
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.roster import Roster
from rpcpipe.transport.rpc import RpcTransport
from support import faults

pytestmark = pytest.mark.alone

FAST = [
    ("SIGKILL", "forward", 0), ("SIGKILL", "launch", 1), ("SIGSEGV", "backward", 1),
    ("_exit", "optimizer", 1), ("_exit", "idle", 2),
    ("SIGSTOP", "forward", 2), ("SIGSTOP", "close", 1), ("GIL", "backward", 0),
    ("_exit", "build", 1), ("SIGKILL", "ahead", 2), ("SIGSEGV", "by hand", 0), ("SIGKILL", "evaluate", 1),
    ("SIGKILL", "predict", 2), ("_exit", "save", 0), ("SIGKILL", "load", 2), ("SIGSEGV", "state_dict", 1),
    ("SIGKILL", "load_state_dict", 0), ("SIGKILL", "call", 1), ("SIGKILL", "schedule", 1),
]  # fmt: skip
FAST_HEALED = [
    ("SIGKILL", "build", 1), ("SIGKILL", "forward", 0), ("SIGSEGV", "backward", 1), ("_exit", "optimizer", 2),
    ("_exit", "idle", 2), ("SIGSTOP", "forward", 2), ("GIL", "backward", 0), ("memory", "optimizer", 0),
    ("SIGKILL", "ahead", 1), ("SIGKILL", "by hand", 0), ("_exit", "evaluate", 1), ("SIGSEGV", "predict", 2),
    ("SIGKILL", "save", 0), ("SIGKILL", "load", 1), ("_exit", "state_dict", 2), ("SIGKILL", "load_state_dict", 0),
    ("SIGKILL", "call", 1),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "phase", "stage"), FAST)
def test_a_fault_is_named_in_time_and_leaves_nothing(fault: str, phase: str, stage: int, tmp_path: Path) -> None:
    found = faults.run(fault, phase, stage, tmp_path)
    assert found is not None
    assert not found.left
    assert found.close_seconds <= 2.0
    if phase == "close":
        return
    assert found.seconds <= faults.LIMITS[fault]
    assert f"worker{stage} (" in found.error
    assert (f"stage {stage} " in found.error) == (phase not in ("launch", "build"))
    says = {"_exit": "exited with status 3", "SIGSTOP": "it is stopped", "GIL": "does not let go of the GIL"}
    assert says.get(fault, f"was killed by {fault}") in found.error


@pytest.mark.parametrize(("fault", "phase", "stage"), FAST_HEALED)
def test_a_call_is_healed_of_a_fault(fault: str, phase: str, stage: int, tmp_path: Path) -> None:
    found = faults.run(fault, phase, stage, tmp_path, heal=True)
    if found is None:
        pytest.skip("this machine lets us make no memory cgroup")
    assert not found.left
    assert not found.wrong
    assert found.seconds <= faults.LIMITS[fault] + faults.HEAL_SECONDS


def test_two_at_once(tmp_path: Path) -> None:
    found = faults.run("SIGKILL", "forward", 0, tmp_path, also=[2])
    assert found is not None
    assert "was killed by SIGKILL" in found.error
    assert found.seconds <= 0.1
    assert not found.left


@pytest.mark.parametrize("also", [[2], [1, 2]], ids=["two", "all"])
@pytest.mark.parametrize("phase", ["optimizer", "idle"])
def test_a_call_is_healed_of_several_faults(phase: str, also: list[int], tmp_path: Path) -> None:
    found = faults.run("SIGKILL", phase, 0, tmp_path, heal=True, also=also)
    assert found is not None
    assert (found.left, found.wrong) == ((), ())
    assert found.seconds <= faults.LIMITS["SIGKILL"] + 2 * faults.HEAL_SECONDS


def test_the_last_lines_of_the_dead_are_in_the_error() -> None:
    with rp.launch(workers=2, threads=1, heal=False) as cluster:
        pipe = faults.make_pipe(cluster)
        cluster.call(2, lambda: print("I feel dizzy"))

        def die() -> None:
            sys.stderr.write("the unfinished last words")
            os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(rp.WorkerLost, match=r"(?s)stage 1 .*I feel dizzy.*unfinished last words") as caught:
            cluster.call(2, die)
        lost = caught.value
        assert (lost.worker, lost.stages, lost.pid) == ("worker1", (1,), cluster.workers[1].pid)
        with pytest.raises(rp.WorkerLost):
            pipe.train_step(torch.randn(4, 8), torch.randn(4, 8))
        assert "1 lost" in repr(cluster)


@pytest.fixture
def small_memory() -> Iterator[Path]:
    group = Path("/sys/fs/cgroup/memory") / f"rpcpipe{os.getpid()}"
    with faults.small_memory(group) as made:
        if not made:
            pytest.skip("this machine lets us make no memory cgroup")
        yield group


def test_the_kernels_killing_for_memory_is_named(small_memory: Path) -> None:
    with rp.launch(workers=2, threads=1, heal=False) as cluster:
        (small_memory / "cgroup.procs").write_text(str(cluster.workers[0].pid))
        with pytest.raises(rp.WorkerLost, match=r"SIGKILL \(the kernel has just killed a process for want of memory"):
            cluster.call(1, lambda: torch.ones(100_000_000).sum().item())


def test_a_stuck_action_is_named_by_the_deadline() -> None:
    with rp.launch(workers=2, threads=1) as cluster:
        pipe = rp.Pipeline(
            [torch.nn.Linear(8, 8), Sleep()], cluster, loss=torch.nn.functional.mse_loss, chunks=2,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        )  # fmt: skip
        pipe.runtime.driver._timeout = 0.6
        start = time.monotonic()
        with pytest.raises(rp.DeadlineExceeded, match="worker1 runs forward of stage 1, micro-batch 0"):
            pipe.train_step(torch.randn(4, 8), torch.randn(4, 8))
        assert time.monotonic() - start < 0.6 + 1.0


class Sleep(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(4)  # what is stuck
        return x


def test_results_of_a_dead_generation_are_dropped(cluster: rp.Cluster) -> None:
    """A message that a worker of an earlier cluster sent late must not reach this one's step."""
    pipe = faults.make_pipe(cluster)
    x = torch.randn(8, 8)
    expected = pipe.train_step(x, x).loss
    stranger = RpcTransport(Roster("a dead generation", DRIVER, cluster.transport.roster.seats))
    identity = pipe.runtime.driver._pipeline
    from rpcpipe.schedules import Action
    from rpcpipe.worker.messages import Port

    for worker in cluster.workers:
        for chunk in range(4):
            for stage in range(4):
                port = Port(Action("F", stage, chunk), "input")
                stranger.send(worker.name, "deliver", identity, 1, port, torch.full((2, 8), 1e9))
        assert stranger.call(worker.name, "cancel", identity, 99, 0, 0).result(5) is None
    result = pipe.train_step(x, x)
    assert 0 < result.loss < expected
    pipe.close()


def test_a_lost_worker_is_raised_afresh() -> None:
    error = WorkerLost("gone", worker="worker1", stages=(1,), host="here", pid=3)
    again = error.again()
    assert again is not error
    assert (str(again), again.worker, again.stages, again.host, again.pid) == ("gone", "worker1", (1,), "here", 3)
