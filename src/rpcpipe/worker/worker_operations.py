"""The operations that an executor runs by itself, because they are of a worker as a whole."""

from __future__ import annotations

from typing import Any, NamedTuple

from rpcpipe.worker.messages import ReadOrder


class CreateActor(NamedTuple):
    """Build a pipeline's stages from a pickled ActorSpec; reply with their StageInfos."""

    pipeline: str
    spec: bytes


class ReviveActor(NamedTuple):
    """Build a pipeline's stages from the memory file ``path`` of a worker that has died; reply as CreateActor does.

    ``copy``: go on in a copy of it.
    """

    pipeline: str
    path: str
    copy: bool


class CallFunction(NamedTuple):
    """Run a pickled ``(function, args)``; reply with the pickled result."""

    call: bytes


class ForwardByHand(NamedTuple):
    """Apply the module of ``stage`` to ``inputs`` with its autograd graph, for distributed autograd by hand."""

    pipeline: str
    stage: int
    inputs: Any


class ReadBatch(NamedTuple):
    """Read a batch for a pipeline's stages; reply with a ReadAnswer."""

    pipeline: str
    order: ReadOrder


class ForgetStep(NamedTuple):
    """Forget the failed ``step``."""

    pipeline: str
    step: int


class DropActor(NamedTuple):
    """Free a pipeline's stages."""

    pipeline: str


class TakeSnapshot(NamedTuple):
    """Take snapshot ``number`` of the worker's stages, between two steps, and begin to send it to worker ``keeper``.

    It has a place in the pipeline's sequence, unlike the others.
    """

    number: int
    keeper: str


WorkerOperation = (
    CreateActor | ReviveActor | CallFunction | ForwardByHand | ReadBatch | ForgetStep | DropActor | TakeSnapshot
)  # fmt: skip
