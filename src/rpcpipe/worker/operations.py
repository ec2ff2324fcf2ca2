"""What a worker can be asked to do, as values: the driver makes them, ``Actor.execute`` matches on them.

Named tuples, because a step carries hundreds of them and they pickle fastest. A new operation is a class here, its
case in ``Actor.execute`` or ``StageSet.execute`` (mypy says which is missing), and
a title if a person may read of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rpcpipe.checkpoint.manifest import Manifest
from rpcpipe.model.wiring import StageLinks
from rpcpipe.schedules.action import NAMES
from rpcpipe.stage.context import MicroBatch, StepContext
from rpcpipe.worker.messages import Port, Route, Update

# --- of a step, in the order in which they come ---


class BeginStep(NamedTuple):
    """Start a step; that it starts means that the step before is settled everywhere."""

    plan: StepContext


class RunAction(NamedTuple):
    """Execute one action of the schedule and send its results on; an update replies with a Report."""

    route: Route
    context: MicroBatch | Update | None = None


class ReduceScatter(NamedTuple):
    """Push the gradients that other members of ``group`` sum to them."""

    group: str


class Reduce(NamedTuple):
    """Sum what was pushed for ``bucket`` and what is here; ``spread``: push the sums to the other members."""

    group: str
    bucket: int
    spread: bool


class GatherSums(NamedTuple):
    """Take over the gradients that another member has summed."""

    group: str
    bucket: int


class GatherWeights(NamedTuple):
    """Take over the weights that another member has updated."""

    group: str
    bucket: int


class GiveStatistics(NamedTuple):
    """Push what the micro-batches here add to running statistics to the first replica."""

    stage: int


class AddStatistics(NamedTuple):
    """Move running statistics by what passed in all replicas, and push the buffers to the others."""

    stage: int


class TakeBuffers(NamedTuple):
    """Take over the first replica's buffers."""

    stage: int


class ReportStep(NamedTuple):
    """Reply with the worker's Report: all actions of the step are done here."""


class NormalizeGradients(NamedTuple):
    """Divide the gradients of sums by ``total``, the batch's count; replies with their norms by stage."""

    total: float


class PublishGradients(NamedTuple):
    """File the gradients, times ``factor`` (clipping), in the distributed-autograd context."""

    context_id: int
    factor: float


class UpdateWeights(NamedTuple):
    """Apply the context's gradients; ``changes``: per group the hyperparameters set on the driver."""

    context_id: int
    changes: Sequence[Mapping[str, Any]]


class LastUpdate(NamedTuple):
    """Reply with (start, end) of the last update in ns. Runs after the all-gather of sharded weights."""


class RollBackStep(NamedTuple):
    """Undo ``step``, which may not have begun here; ``updating``: its update too."""

    step: int
    updating: bool


class EndStream(NamedTuple):
    """Keep no version but the newest; ``updates``: go back to so many first."""

    updates: int | None = None


StepOperation = (
    BeginStep | RunAction | ReduceScatter | Reduce | GatherSums | GatherWeights | GiveStatistics | AddStatistics
    | TakeBuffers | ReportStep | NormalizeGradients | PublishGradients | UpdateWeights | LastUpdate | RollBackStep
    | EndStream
)  # fmt: skip

# --- between steps ---


class GetModule(NamedTuple):
    """The stage's module itself, for an RRef to it."""

    stage: int


class GetParameter(NamedTuple):
    """The parameter itself, for an RRef to it."""

    stage: int
    name: str


class CallModule(NamedTuple):
    """Run the pickled ``function(module)``; replies with the pickled result. ``seed``: of random numbers."""

    stage: int
    function: bytes
    seed: int | None


class SetMetrics(NamedTuple):
    """What the last stage measures beside the loss from now on: pickled functions by name."""

    metrics: bytes


class SetSelection(NamedTuple):
    """What the last stage keeps of an output that comes with a target: a pickled (output, target) -> nest."""

    function: bytes


class GetState(NamedTuple):
    """Reply with each stage's state under the unsplit model's names, on the CPU."""


class LoadState(NamedTuple):
    """Inverse of ``GetState``; every shape is checked before anything changes."""

    states: Mapping[int, Mapping[str, Any]]


class SaveShard(NamedTuple):
    """Write optimizer state, and the first replica weights, to files of ``folder`` called ``label``."""

    folder: Path
    label: str


class ReadCheckpoint(NamedTuple):
    """Read what these stages need of a checkpoint; replies with the names of their weights."""

    folder: Path
    manifest: Manifest


class ApplyCheckpoint(NamedTuple):
    """Go on from what ``ReadCheckpoint`` has read, with random numbers from ``seed``."""

    seed: int


class DropCheckpoint(NamedTuple):
    """Forget what was read: another worker could not read its part."""


class ReleaseLayers(NamedTuple):
    """Reply with the named layers, their optimizer state and kept gradients, for another worker's ``Repartition``."""

    names: Sequence[str]


class ReceiveLayers(NamedTuple):
    """Unpickle what other workers have released; it is kept for the ``Repartition`` that follows."""

    given: Sequence[bytes]


class GetOptimizerState(NamedTuple):
    """Reply with the optimizer's state by layer and parameter."""


class Repartition(NamedTuple):
    """Hold the stages ``parts`` from now on: of the layers that are here and those received.

    ``others``: by layer, the optimizer's state that replicas have had.
    """

    parts: Mapping[int, tuple[Sequence[str], int]]
    last_stage: int
    stage_links: StageLinks
    others: Mapping[str, Mapping[str, Any]]


HoldingOperation = (
    GetModule | GetParameter | CallModule | SetMetrics | SetSelection | GetState | LoadState | SaveShard
    | ReadCheckpoint | ApplyCheckpoint | DropCheckpoint | ReleaseLayers | ReceiveLayers
    | GetOptimizerState | Repartition
)  # fmt: skip

# --- of the worker, outside of any step ---


class CreateActor(NamedTuple):
    """Build a pipeline's stages from a pickled ActorSpec; replies with what they are."""

    pipeline: str
    spec: bytes


class CallFunction(NamedTuple):
    """Run a pickled ``(function, args)``; replies with the pickled result."""

    call: bytes


class ForwardByHand(NamedTuple):
    """Apply stage ``stage``'s module to ``inputs``, with its graph: for distributed autograd by hand."""

    pipeline: str
    stage: int
    inputs: Any


class ForgetStep(NamedTuple):
    """Forget ``step``, which failed."""

    pipeline: str
    step: int


class DropActor(NamedTuple):
    """Free a pipeline's stages."""

    pipeline: str


WorkerOperation = CreateActor | CallFunction | ForwardByHand | ForgetStep | DropActor

Operation = StepOperation | HoldingOperation | WorkerOperation


class Task(NamedTuple):
    """One entry of a worker's strict sequence, and the values that it awaits.

    In a stream a failure ends the tasks of its ``group`` and of later ones; elsewhere all have 0.
    """

    operation: Operation
    awaits: tuple[Port, ...] = ()
    group: int = 0


# A worker, and tasks that go to it in one call.
Call = tuple[str, list[Task]]

_TITLES: Mapping[type, str] = {
        UpdateWeights: "optimizer", CreateActor: "building the stage", CallModule: "call", CallFunction: "run",
        ForwardByHand: "forward", SaveShard: "save", GetState: "state dict", LoadState: "load state dict",
        ReadCheckpoint: "read checkpoint", ApplyCheckpoint: "apply checkpoint", Repartition: "moving layers",
        ReleaseLayers: "moving layers", ReceiveLayers: "moving layers", PublishGradients: "hand over",
        ReportStep: "report",
}  # fmt: skip


def title(operation: Operation) -> str:
    """Name ``operation`` for a person."""
    if isinstance(operation, RunAction):
        return NAMES[operation.route.action.kind]
    name = type(operation).__name__
    return _TITLES.get(type(operation), "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip())
