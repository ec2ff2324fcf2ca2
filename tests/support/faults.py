"""One fault in one phase on one stage, and what the driver makes of it: for the tests and ./benchmarks/run faults."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.cluster.process import WorkerProcess

FAULTS = ("SIGKILL", "SIGSEGV", "_exit", "SIGSTOP", "GIL")
PHASES = ("forward", "backward", "optimizer", "idle", "launch", "close")
STAGES = 3
_SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSEGV": signal.SIGSEGV, "SIGSTOP": signal.SIGSTOP}
# Limits of detection, in seconds: the process watch, and the heartbeat.
LIMITS = {"SIGKILL": 0.1, "SIGSEGV": 0.1, "_exit": 0.1, "SIGSTOP": 2.0, "GIL": 2.0}


def strike(fault: str, stamp: str) -> None:
    """Runs on a worker: note the time, then the fault."""
    Path(stamp).write_text(repr(time.monotonic()))
    if fault == "_exit":
        os._exit(3)
    elif fault == "GIL":
        ctypes.PyDLL(None).sleep(30)  # PyDLL, unlike CDLL, keeps the GIL
    else:
        os.kill(os.getpid(), _SIGNALS[fault])


def strike_if(phase: str) -> None:
    """What the driver has armed, if it is for this phase."""
    wanted, fault, stamp = os.environ.get("RPCPIPE_TRAP", "  ").split(" ", 2)
    if wanted == phase:
        strike(fault, stamp)


class Trap(nn.Module):
    """Strikes in forward or backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        strike_if("forward")
        if x.requires_grad:
            x.register_hook(lambda grad: strike_if("backward"))  # type: ignore[no-untyped-call]
        return x


class TrapSGD(torch.optim.SGD):
    """Strikes once it has updated."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        strike_if("optimizer")


def make_pipe(cluster: rp.Cluster) -> rp.Pipeline:
    """A small pipeline with a trap on every stage."""
    torch.manual_seed(0)
    model = [nn.Sequential(nn.Linear(8, 8), Trap(), nn.Linear(8, 8)) for _ in cluster.workers]
    return rp.Pipeline(
        model, cluster, loss=nn.functional.mse_loss, optimizer=lambda params: TrapSGD(params, lr=0.1), chunks=4
    )


@dataclass(frozen=True)
class Outcome:
    """``seconds`` from the fault to the error (close: how long it took); ``left``: what is still there."""

    seconds: float
    close_seconds: float
    error: str
    left: tuple[str, ...]


def run(fault: str, phase: str, stage: int, folder: Path, *, also: int | None = None) -> Outcome | None:
    """``fault`` on ``stage`` (and on ``also``, at once) in ``phase``; None where the two make no sense."""
    stamp = folder / f"stamp{stage}"
    if phase == "launch":
        return _in_launch(fault, stage) if fault in _SIGNALS else None
    cluster = rp.launch(workers=STAGES, threads=1, timeout=20.0)
    pids = [worker.pid for worker in cluster.workers]
    pipe = make_pipe(cluster)
    x = torch.randn(8, 8)
    pipe.train_step(x, x)
    struck = [stage] if also is None else [stage, also]
    error, seconds = "", 0.0
    try:
        if phase in ("idle", "close"):
            for number in struck:
                _from_outside(cluster, number, fault, folder / f"stamp{number}")
            if phase == "idle":
                wait_for(lambda: not cluster.healthy)
        else:
            for number in struck:
                trap = f"{phase} {fault} {folder / f'stamp{number}'}"
                pipe.stages[number].call(partial(_arm, trap))
        if phase != "close":
            pipe.train_step(x, x)
    except rp.RpcPipeError as caught:
        error, seconds = f"{type(caught).__name__}: {caught}", time.monotonic() - float(stamp.read_text())
    start = time.monotonic()
    cluster.close()
    ended = time.monotonic() - start
    return Outcome(ended if phase == "close" else seconds, ended, error, left_over(pids))


def _from_outside(cluster: rp.Cluster, stage: int, fault: str, stamp: Path) -> None:
    worker = cluster.workers[stage]
    if fault in _SIGNALS:
        stamp.write_text(repr(time.monotonic()))
        os.kill(worker.pid, _SIGNALS[fault])
    else:
        from rpcpipe.transport.user_pickling import named_dumps

        cluster.transport.call(worker.name, "run", named_dumps((strike, (fault, str(stamp))), "strike"))
        wait_for(lambda: stamp.exists() and stamp.read_text() != "")


def _in_launch(fault: str, stage: int) -> Outcome:
    seconds, error, pids = 0.0, "", list[int]()
    with _struck_at_join(fault, stage, pids) as stamp:
        try:
            rp.launch(workers=STAGES, threads=2, timeout=20.0).close()
        except rp.RpcPipeError as caught:
            error, seconds = f"{type(caught).__name__}: {caught}", time.monotonic() - stamp[0]
    return Outcome(seconds, 0.0, error, left_over(pids))


def _arm(trap: str, module: nn.Module) -> None:
    os.environ["RPCPIPE_TRAP"] = trap


@contextmanager
def _struck_at_join(fault: str, stage: int, pids: list[int]) -> Iterator[list[float]]:
    """Workers of the block's launch: the one of ``stage`` is struck when it is about to join."""
    send, stamp = WorkerProcess.send, list[float]()

    def sending(self: WorkerProcess, kind: str, payload: object = None) -> None:
        if kind == "join":
            pids.append(self.pid)
            if self.name == f"worker{stage}":
                stamp.append(time.monotonic())
                os.kill(self.pid, _SIGNALS[fault])
        send(self, kind, payload)

    WorkerProcess.send = sending  # type: ignore[method-assign]
    try:
        yield stamp
    finally:
        WorkerProcess.send = send  # type: ignore[method-assign]


def left_over(pids: list[int]) -> tuple[str, ...]:
    """Processes and files that should be gone."""
    return tuple(f"process {pid}" for pid in pids if psutil.pid_exists(pid))


def ended(process: psutil.Process) -> bool:
    """Gone, or waiting for whoever inherited it to notice."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.002)
