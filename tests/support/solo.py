"""One worker's actor without a driver, whose state is kept, and what a successor finds at any instant."""

from __future__ import annotations

import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from rpcpipe.model.wiring import Wiring
from rpcpipe.schedules import Action
from rpcpipe.stage.autograd import StageInput
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.kept_memory import KeptMemory
from rpcpipe.stage.progress import Progress
from rpcpipe.transport.local import LocalTransport
from rpcpipe.worker.actor import Actor
from rpcpipe.worker.actor_spec import ActorSpec
from rpcpipe.worker.messages import Orders, Route
from rpcpipe.worker.operations import BeginStep, CommitStep, Operation, ReportStep, RollBackStep, RunAction, TakeOrders
from rpcpipe.worker.revival import restore
from rpcpipe.worker.stage_set import StageSet

CHUNKS = 2
CPU = torch.device("cpu")
Make = Callable[[], Sequence[nn.Module]]
# What a step's operations are executed with: the operation, and the values that it awaits.
Call = tuple[Operation, dict[str, Any]]


def spec_of(layers: Sequence[nn.Module], optimizer: Any, loss: Any = None, **options: Any) -> ActorSpec:
    named = OrderedDict((str(index), layer) for index, layer in enumerate(layers))
    return ActorSpec(
        stages={0: (named, 0)}, last_stage=0, loss=loss or nn.functional.mse_loss, optimizer=optimizer, seed=3,
        wirings={name: Wiring() for name in named}, keep=True, **options,
    )  # fmt: skip


class Solo:
    """An actor that holds a whole model, and the driver's side of its steps."""

    def __init__(self, actor: Actor, ledger: LocalTransport) -> None:
        self.actor, self.ledger = actor, ledger

    @classmethod
    def of(cls, spec: ActorSpec) -> Solo:
        ledger = LocalTransport()
        return cls(Actor("worker0", StageSet(spec, CPU), send=_send, ledger=ledger), ledger)

    @classmethod
    def revived(cls, path: str) -> Solo:
        ledger, restored = LocalTransport(), restore(KeptMemory.open(path), CPU)
        return cls(Actor("worker0", restored.held, send=_send, ledger=ledger, restored=restored), ledger)

    @property
    def path(self) -> str:
        """The memory's, as a keeper opens it."""
        kept_at = self.actor.held.kept_at
        assert kept_at is not None
        return f"/proc/{kept_at.pid}/fd/{kept_at.descriptor}"

    def execute(self, operation: Operation, values: dict[str, Any] | None = None) -> Any:
        return self.actor.execute(operation, values or {})

    def step(self, step: int, *, accumulates_on: int | None = None, updates: bool = True, lr: float = 0.1) -> None:
        """Run the whole of ``step``, on its own batch."""
        for operation, values in calls(step, accumulates_on, updates, lr):
            self.execute(operation, values)

    def roll_back(self, step: int) -> None:
        self.execute(RollBackStep(step, updating=True))

    def state(self, *, attributes: bool = True) -> bytes:
        """Everything that training goes on from, as bytes that compare; a rollback leaves ``attributes``."""
        held, optimizer = self.actor.held, self.actor.held.optimizer
        assert optimizer is not None
        held.switch_to_own_modes()
        modules = [module for root in held.buffered for module in root.modules()]
        tensors = [
            [(name, tensor) for name, tensor in (*module._parameters.items(), *module._buffers.items())]
            for module in modules
        ]
        state = [optimizer.optimizer.state.get(parameter) for parameter in optimizer.parameters]
        sums = [
            (step, [own.get(parameter) for parameter in held.parameters]) for step, own in held.accumulated.sums.items()
        ]
        modes = [(module.training, attributes and vars(module).get("calls")) for module in modules]
        return pickle.dumps(_plain([tensors, state, sums, modes, optimizer.groups()]))


def calls(
    step: int, accumulates_on: int | None = None, updates: bool = True, lr: float = 0.1, *, ahead: bool = False
) -> Iterator[Call]:
    """Yield the operations of a training step."""
    generator = torch.Generator().manual_seed(step)
    plan = StepContext(
        step, step, True, (0.5,) * CHUNKS, accumulates_on=accumulates_on, updates=updates, ahead=ahead
    )  # fmt: skip
    yield BeginStep(plan), {}
    for kind in "FB":
        for chunk in range(CHUNKS):
            values: dict[str, Any] = {}
            if kind == "F":
                x, y = torch.randn(2, 3, 4, generator=generator)
                values = {"input": StageInput.constant((x, {})), "target": y}
            yield RunAction(Route(Action(kind, 0, chunk), (), ())), values
    yield ReportStep(), {}
    if updates:
        yield TakeOrders(Orders([{"lr": lr}], Progress(1))), {}
        yield CommitStep(), {}


def _send(*_: Any) -> None:
    raise AssertionError("there is nobody else")


def _plain(value: Any) -> Any:
    """A nest with its tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().contiguous().view(torch.uint8).numpy().tobytes()
            if value.dim()
            else value.detach().reshape(1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def copy_of(path: str) -> str:
    """A copy of a memory file as it is now: what a successor finds if its owner dies here. Closed by ``forget``."""
    source, target = os.open(path, os.O_RDONLY), os.memfd_create("copy")
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    place = 0
    while place < size:
        try:
            place = os.lseek(source, place, os.SEEK_DATA)
        except OSError:  # only a hole is left
            break
        end = os.lseek(source, place, os.SEEK_HOLE)
        os.pwrite(target, os.pread(source, end - place, place), place)
        place = end
    os.close(source)
    return f"/proc/{os.getpid()}/fd/{target}"


def forget(path: str) -> None:
    os.close(int(path.rpartition("/")[2]))


def revived(worker: Solo) -> Solo:
    """The successor of a worker that dies now, between two calls."""
    copy = copy_of(worker.path)
    try:
        return Solo.revived(copy)
    finally:
        forget(copy)


@contextmanager
def every_line(visit: Callable[[], None], only: Callable[[str], bool]) -> Iterator[None]:
    """Call ``visit`` before each line that the block executes of the files for whose name ``only`` holds."""

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            sys.settrace(None)
            try:
                visit()
            finally:
                sys.settrace(enter)
        return line

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return line if only(frame.f_code.co_filename) else None

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(None)
