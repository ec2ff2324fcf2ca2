"""One fault in one phase on one stage, and what the driver makes of it: for the tests and ./benchmarks/run faults."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.cluster.process import WorkerProcess
from support.local_cluster import LocalCluster

FAULTS = ("SIGKILL", "SIGSEGV", "_exit", "memory", "SIGSTOP", "GIL")
STAGES = 3
_SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSEGV": signal.SIGSEGV, "SIGSTOP": signal.SIGSTOP}
# Limits of detection, in seconds: the process watch, and the heartbeat.
LIMITS = {"SIGKILL": 0.1, "SIGSEGV": 0.1, "_exit": 0.1, "memory": 0.5, "SIGSTOP": 2.0, "GIL": 2.0}
# What a replacement, and the call made again, may take beyond that: 0.1 s, and several times that on a busy machine.
HEAL_SECONDS = 2.0
# By phase, where the trap is that strikes in it; no trap where the fault comes from outside.
_TRAPS = {
    "build": "build", "forward": "forward", "backward": "backward", "optimizer": "optimizer", "ahead": "optimizer",
    "by hand": "backward", "evaluate": "inference", "predict": "inference", "save": "state", "load": "load",
    "state_dict": "state", "load_state_dict": "load", "call": "call", "schedule": "move",
}  # fmt: skip
PHASES = ("launch", *_TRAPS, "idle", "close")
# Nothing can heal where there is no cluster yet or any more. A step by hand is the caller's to repeat.
HEALED = [phase for phase in PHASES if phase not in ("launch", "close", "schedule")]


def strike(fault: str, stamp: str) -> None:
    """Runs on a worker: note the time, then the fault."""
    if fault == "memory":
        (_group_of(stamp) / "cgroup.procs").write_text(str(os.getpid()))
    Path(stamp).write_text(repr(time.monotonic()))
    if fault == "_exit":
        os._exit(3)
    elif fault == "GIL":
        ctypes.PyDLL(None).sleep(30)  # PyDLL, unlike CDLL, keeps the GIL
    elif fault == "memory":
        torch.ones(100_000_000).sum()
    else:
        os.kill(os.getpid(), _SIGNALS[fault])


def strike_if(place: str) -> None:
    """What the driver has armed, if it is for this place."""
    wanted, fault, stamp = os.environ.get("RPCPIPE_TRAP", "  ").split(" ", 2)
    if wanted == place:
        strike(fault, stamp)


def _group_of(stamp: str) -> Path:
    return Path("/sys/fs/cgroup/memory") / f"rpcpipe-{Path(stamp).parent.name}-{Path(stamp).name}"


@contextmanager
def small_memory(group: Path) -> Iterator[bool]:
    """Make a memory cgroup of 64 MiB for the block; false where this machine lets us make none."""
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    except OSError:
        yield False
        return
    yield True
    wait_for(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


class Trap(nn.Module):
    """Strikes in forward, backward, when its state is read or set, and when it arrives at another worker."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        strike_if("forward" if self.training else "inference")
        if x.requires_grad:
            x.register_hook(lambda grad: strike_if("backward"))  # type: ignore[no-untyped-call]
        return x

    def get_extra_state(self) -> str:
        strike_if("state")
        return "a trap"

    def set_extra_state(self, state: Any) -> None:
        strike_if("load")

    def __setstate__(self, state: dict[str, Any]) -> None:
        strike_if("move")
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class TrapSGD(torch.optim.SGD):
    """Strikes once it has updated half of its parameters."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        [group] = self.param_groups
        whole = group["params"]
        group["params"] = whole[: len(whole) // 2]
        super().step()
        strike_if("optimizer")
        group["params"] = whole[len(whole) // 2 :]
        super().step()
        group["params"] = whole


def block(struck: str = "") -> nn.Sequential:
    """A layer with a trap; ``struck``: the fault and stamp of one that strikes when it is built, once."""
    if struck:
        fault, stamp = struck.split(" ", 1)
        if not Path(stamp).exists():
            strike(fault, stamp)
    return nn.Sequential(nn.Linear(8, 8), Trap(), nn.Linear(8, 8))


def make_pipe(cluster: Any, struck: dict[int, str] | None = None) -> rp.Pipeline:
    """A small pipeline with a trap on every stage; ``struck``: by stage, a fault and stamp for when it is built."""
    torch.manual_seed(0)
    own = struck or {}
    layers = [rp.LayerSpec(block, own.get(index // 2, "")) for index in range(2 * len(cluster.workers))]
    return rp.Pipeline(
        layers, cluster, loss=nn.functional.mse_loss, optimizer=lambda params: TrapSGD(params, lr=0.1, momentum=0.9),
        chunks=4, balance=[2] * len(cluster.workers),
    )  # fmt: skip


# --- what is called in each phase ---


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    return x, x.flip(1)


def shrink(module: nn.Module) -> float:
    """Change a stage's weights, in two steps."""
    first, *_, last = module.parameters()
    with torch.no_grad():
        first.mul_(0.5)
        strike_if("call")
        last.mul_(0.5)
        return float(first.sum() + last.sum())


def act(phase: str, pipe: rp.Pipeline, stage: int, folder: Path) -> list[Any]:
    """Call what ``phase`` is about; return what it gives. A step by hand that is lost is repeated."""
    match phase:
        case "ahead":
            return [result.loss for result in pipe.train([batch(seed) for seed in range(4)], ahead=1)]
        case "by hand":
            return [by_hand(pipe)]
        case "evaluate":
            return [pipe.evaluate([batch(seed) for seed in range(4)])]
        case "predict":
            return [output.sum().item() for output in pipe.predict([batch(seed)[0] for seed in range(4)])]
        case "save":
            return [str(pipe.save(folder / "saved").name)]
        case "load":
            return [pipe.load(folder / "before"), pipe.trained]
        case "state_dict":
            return sums(pipe)
        case "load_state_dict":
            pipe.load_state_dict(
                {key: value * (1 + (key[-6:] == "weight")) for key, value in pipe.state_dict().items()}
            )
            return []
        case "call":
            return [pipe.stages[stage].call(shrink)]
        case "schedule":
            pipe.schedule = "interleaved"
            return []
    return [pipe.train_step(*batch()).loss]


def by_hand(pipe: rp.Pipeline) -> float:
    with pipe.step() as s:
        loss = s.forward_backward(*batch())
        s.optimize()
    return loss


def sums(pipe: rp.Pipeline) -> list[Any]:
    """All the bits of the weights."""
    return [value.tolist() if isinstance(value, torch.Tensor) else value for value in pipe.state_dict().values()]


def prepare(pipe: rp.Pipeline, folder: Path) -> None:
    """What is done before the fault."""
    pipe.train_step(*batch())
    pipe.save(folder / "before", position="before")
    pipe.train_step(*batch(7))


def finish(pipe: rp.Pipeline) -> list[Any]:
    """What is done afterwards, to see that all is as it should be."""
    return [pipe.train_step(*batch()).loss, pipe.train_step(*batch(1)).loss, pipe.trained, sums(pipe)]


@cache
def undisturbed(phase: str, stage: int) -> list[Any]:
    """What comes out without a fault, on workers without processes."""
    pipe = make_pipe(LocalCluster(STAGES))
    with tempfile.TemporaryDirectory() as folder:
        if phase != "build":
            prepare(pipe, Path(folder))
        found = act(phase, pipe, stage, Path(folder))
        return [found, finish(pipe)]


# --- one case ---


@dataclass(frozen=True)
class Outcome:
    """``seconds`` from the fault to the error, or to the end of the healed call (close: how long it took).

    ``left``: processes that should be gone. ``wrong``: what is not as it should be otherwise.
    """

    seconds: float
    close_seconds: float
    error: str
    left: tuple[str, ...]
    wrong: tuple[str, ...] = ()


def run(
    fault: str, phase: str, stage: int, folder: Path, *, heal: bool = False, also: Sequence[int] = ()
) -> Outcome | None:
    """``fault`` on ``stage``, and on each of ``also``, in ``phase``; None where the two make no sense, or cannot be.

    With ``heal`` the cluster stays, for further cases.
    """
    struck = [stage, *also]
    if phase == "launch":
        return _in_launch(fault, stage) if fault in _SIGNALS else None
    if fault == "memory" and phase in ("idle", "close"):
        return None
    if fault != "memory":
        return (_healed if heal else _lost)(fault, phase, struck, folder)
    with small_memory(_group_of(str(folder / f"stamp{stage}"))) as made:
        return (_healed if heal else _lost)(fault, phase, struck, folder) if made else None


def _case(
    cluster: rp.Cluster, fault: str, phase: str, struck: list[int], folder: Path
) -> tuple[rp.Pipeline, list[Any]]:
    """Have the fault in the call that ``phase`` is about; return the pipeline and what the call gives."""
    stamps = {number: folder / f"stamp{number}" for number in struck}
    if phase == "build":
        pipe = make_pipe(cluster, {number: f"{fault} {stamp}" for number, stamp in stamps.items()})
        return pipe, act(phase, pipe, struck[0], folder)
    pipe = make_pipe(cluster)
    prepare(pipe, folder)
    for number, stamp in stamps.items():
        if phase in ("idle", "close"):
            _from_outside(cluster, number, fault, stamp)
        else:
            pipe.stages[number].call(partial(_arm, f"{_TRAPS[phase]} {fault} {stamp}"))
    if phase == "idle":
        wait_for(lambda: not cluster.healthy)
    if phase == "close":
        return pipe, []
    if phase == "by hand" and cluster.heal:
        with suppress(rp.WorkerLost):
            raise AssertionError(f"a step by hand does not heal: {by_hand(pipe)}")
        return pipe, [by_hand(pipe)]
    return pipe, act(phase, pipe, struck[0], folder)


def _lost(fault: str, phase: str, struck: list[int], folder: Path) -> Outcome:
    cluster = rp.launch(workers=STAGES, threads=1, timeout=20.0, heal=False)
    pids = [worker.pid for worker in cluster.workers]
    error, seconds = "", 0.0
    try:
        _case(cluster, fault, phase, struck, folder)
    except rp.RpcPipeError as caught:
        error, seconds = f"{type(caught).__name__}: {caught}", _since(folder, struck)
    start = time.monotonic()
    cluster.close()
    ended = time.monotonic() - start
    return Outcome(ended if phase == "close" else seconds, ended, error, left_over(pids))


def _healed(fault: str, phase: str, struck: list[int], folder: Path) -> Outcome:
    cluster = rp.launch(workers=STAGES, threads=1, timeout=20.0)
    victims, first = {f"worker{number}": cluster.workers[number].pid for number in struck}, len(cluster.events)
    with _warnings() as told:
        pipe, found = _case(cluster, fault, phase, struck, folder)
        seconds = _since(folder, struck)
    same = [found, finish(pipe)] == undisturbed(phase, struck[0])
    pipe.close()
    wrong = [] if same else [f"{phase} gave something else"]
    for name, pid in victims.items():
        events = {event.kind: event for event in cluster.events[first:] if event.worker == name}
        lost, after = events.get("died") or events.get("silent"), events.get("replaced")
        if lost is None or after is None or lost.pid != pid or f"{after.how}; another process" not in " ".join(told):
            wrong.append(f"no event or no warning of {name}: {list(events)}, {told}")
        elif after.seconds is None or after.seconds > HEAL_SECONDS:
            wrong.append(f"the replacement of {name} took {after.seconds} s")
    return Outcome(seconds, 0.0, "", left_over(list(victims.values())), tuple(wrong))


def _since(folder: Path, struck: list[int]) -> float:
    return time.monotonic() - float((folder / f"stamp{struck[0]}").read_text())


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The warnings of logger ``rpcpipe`` in the block."""
    told = list[str]()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("rpcpipe").addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger("rpcpipe").removeHandler(handler)


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
            rp.launch(workers=STAGES, threads=2, timeout=20.0, heal=False).close()
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
