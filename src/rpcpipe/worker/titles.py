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
from rpcpipe.worker.worker_operations import CallFunction, CreateActor, ForwardByHand

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
    name = type(operation).__name__
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
    return _TITLES.get(type(operation), words)
