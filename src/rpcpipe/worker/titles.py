"""What operations are called in messages to users."""

from __future__ import annotations

from collections.abc import Mapping

from rpcpipe.schedules.action import NAMES
from rpcpipe.worker.operations import (
    ApplyCheckpoint,
    CallModule,
    CommitStep,
    GetOptimizer,
    GetState,
    LoadOptimizer,
    LoadState,
    Operation,
    PublishGradients,
    ReadCheckpoint,
    ReceiveLayers,
    ReleaseLayers,
    Repartition,
    ReportStep,
    RunAction,
    SaveShard,
    UpdateWeights,
)
from rpcpipe.worker.worker_operations import CallFunction, CreateActor, ForwardByHand, ReadBatch

_TITLES: Mapping[type, str] = {
    UpdateWeights: "optimizer", CreateActor: "building the stage", CallModule: "call", CallFunction: "run",
    ForwardByHand: "forward", SaveShard: "save", GetState: "state dict", LoadState: "load state dict",
    ReadCheckpoint: "read checkpoint", ApplyCheckpoint: "apply checkpoint", Repartition: "moving layers",
    ReleaseLayers: "moving layers", ReceiveLayers: "moving layers", PublishGradients: "hand over",
    ReportStep: "report", CommitStep: "optimizer", GetOptimizer: "optimizer's state",
    LoadOptimizer: "loading the optimizer's state",
}  # fmt: skip


def title(operation: Operation) -> str:
    """Return the name of ``operation`` in messages to users."""
    if isinstance(operation, RunAction):
        return NAMES[operation.route.action.kind]
    if isinstance(operation, ReadBatch):
        return f"reading batch {operation.order.ref.number}"
    name = type(operation).__name__
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
    return _TITLES.get(type(operation), words)


def described(operation: Operation) -> str:
    """Return the name of ``operation``, with stage and micro-batch if it is an action."""
    return operation.route.action.describe() if isinstance(operation, RunAction) else title(operation)


def place_of(operation: Operation) -> tuple[int | None, int | None]:
    """Return the stage and the micro-batch that ``operation`` is about, None where it is about none."""
    if isinstance(operation, RunAction):
        return operation.route.action.stage, operation.route.action.chunk
    return (operation.order.stage if isinstance(operation, ReadBatch) else None), None
