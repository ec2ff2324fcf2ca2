"""The operations of a worker, as values that the driver makes and ``Actor.execute`` matches on.

They are named tuples because a step carries hundreds of them and named tuples pickle fastest. A new operation
needs a class here, a place in a union, a case in what executes that union (``Actor``, ``StageState`` or ``StageSet``,
where mypy says that it is missing; ``Updater`` or ``Executor``), and a title (``worker.titles``) if messages to users
name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rpcpipe.checkpoint.manifest import Manifest
from rpcpipe.model.wiring import StageLinks
from rpcpipe.stage.context import MicroBatch, StepContext
from rpcpipe.worker.agreement import Agreement
from rpcpipe.worker.messages import Orders, Port, Route, Update
from rpcpipe.worker.worker_operations import WorkerOperation

# --- operations of a step, in the order of their execution ---


class BeginStep(NamedTuple):
    """Start a step. Unless it runs ahead, the step before is settled on all workers."""

    plan: StepContext


class RunAction(NamedTuple):
    """Execute one action of the schedule and send its results to other stages; an update replies with a Report."""

    route: Route
    context: MicroBatch | Update | None = None


class ReduceScatter(NamedTuple):
    """Push to every other member of ``group`` the gradients that this member sums."""

    group: str


class Reduce(NamedTuple):
    """Sum all members' gradients of ``bucket``; ``spread``: push the sums to the other members."""

    group: str
    bucket: int
    spread: bool


class GatherSums(NamedTuple):
    """Set the gradients of ``bucket`` to the sums of the member that owns it."""

    group: str
    bucket: int


class GatherWeights(NamedTuple):
    """Set the weights of ``bucket`` to those that the member that owns it has updated."""

    group: str
    bucket: int


class GiveStatistics(NamedTuple):
    """Push to the first replica what this replica's micro-batches add to running statistics."""

    stage: int


class AddStatistics(NamedTuple):
    """Update running statistics from the micro-batches of all replicas; push the buffers to the other replicas."""

    stage: int


class TakeBuffers(NamedTuple):
    """Set the stage's buffers to the first replica's."""

    stage: int


class ReportStep(NamedTuple):
    """Reply with the worker's Report once all actions of the step on this worker are done."""


class NormalizeGradients(NamedTuple):
    """Divide the gradients by ``total``, the batch's count; reply with their norms by stage and index."""

    total: float


class PublishGradients(NamedTuple):
    """Add the gradients, times ``factor`` (clipping), to the distributed-autograd context."""

    context_id: int
    factor: float


class UpdateWeights(NamedTuple):
    """Apply the context's gradients; ``changes``: per parameter group the hyperparameters set on the driver."""

    context_id: int
    changes: Sequence[Mapping[str, Any]]


class LastUpdate(NamedTuple):
    """Reply with what ``Updated`` says of the last update. Runs after the all-gather of sharded weights."""


class TellLosses(NamedTuple):
    """Push the losses that ReportStep has found to all other workers of ``agreement``."""

    agreement: Agreement


class TellNorms(NamedTuple):
    """Divide the gradients by the count of all losses, if they have one; push their norms to all other workers.

    Awaits the losses from the tellers of ``agreement``.
    """

    agreement: Agreement


class ShareWeights(NamedTuple):
    """Push the weights that this worker owns to the other replicas, as values of ``step``: they were restored."""

    step: int


class GetReach(NamedTuple):
    """Reply with how far the update of ``step`` has got on this worker; None if it updates nothing."""

    step: int


class TakeOrders(NamedTuple):
    """Take what the update needs from the driver. Without ``orders`` it awaits them: the step runs ahead."""

    orders: Orders | None = None


class CommitStep(NamedTuple):
    """Update as the orders say, through a distributed-autograd context of this worker's, or not; reply with the Report.

    With ``agreement`` it awaits all others' norms, and all workers update or none. Without, this worker updates if its
    own gradients are finite; another may fail, or its gradients not be: then the driver has the update taken back.
    """

    agreement: Agreement | None = None


class LastReport(NamedTuple):
    """Reply with the Report of CommitStep. Runs after the all-gather of sharded weights."""


class UndoUpdate(NamedTuple):
    """Undo the update of ``step``; what its forwards have changed stays."""

    step: int


class RollBackStep(NamedTuple):
    """Roll ``step`` back, unless it has not begun on this worker; ``updating``: roll back its update, too.

    ``ahead``: nothing has failed; the step must leave no trace, because it ran too early.
    """

    step: int
    updating: bool
    ahead: bool = False


class ResumeStream(NamedTuple):
    """Start ``stream``, the number of the step that opened it, again as ``plan``, after its first ``updates``.

    A worker that had not begun it begins it.
    """

    plan: StepContext
    stream: int
    updates: int


class EndStream(NamedTuple):
    """End ``stream``: drop all versions of the weights except the newest.

    ``updates``: first restore the state after this number of updates. Snapshots stay until another operation comes.
    """

    stream: int
    updates: int | None = None


class BeginCall(NamedTuple):
    """Copy what a call may change of weights and buffers, so that RollBackStep(``number``) undoes it."""

    number: int


UpdateOperation = (
    NormalizeGradients | PublishGradients | UpdateWeights | LastUpdate | TakeOrders | TellLosses | TellNorms
    | CommitStep | LastReport | UndoUpdate | GetReach
    | ShareWeights
)  # fmt: skip

StepOperation = (
    BeginStep | RunAction | ReduceScatter | Reduce | GatherSums | GatherWeights | GiveStatistics | AddStatistics
    | TakeBuffers | ReportStep | UpdateOperation | RollBackStep | ResumeStream | EndStream
    | BeginCall
)  # fmt: skip

# --- operations between steps ---


class GetModule(NamedTuple):
    """Return the stage's module itself, for an RRef to it."""

    stage: int


class GetParameter(NamedTuple):
    """Return the parameter itself, for an RRef to it."""

    stage: int
    name: str


class CallModule(NamedTuple):
    """Run the pickled ``function(module)`` with random numbers from ``seed``; reply with the pickled result.

    With ``seed`` None the worker's random state is kept.
    """

    stage: int
    function: bytes
    seed: int | None


class SetMetrics(NamedTuple):
    """Set the metrics that the last stage measures beside the loss: a pickled dict of functions by name."""

    metrics: bytes


class SetSelection(NamedTuple):
    """Set what the last stage keeps of an output that has a target: a pickled (output, target) -> nest."""

    function: bytes


class ReleaseCaches(NamedTuple):
    """Let the keys and values that generation has kept go."""


class GetState(NamedTuple):
    """Reply with each stage's state under the unsplit model's names, on the CPU; ``trainable``: trained ones alone."""

    trainable: bool = False


class LoadState(NamedTuple):
    """Load the state that ``GetState`` returns; every shape is checked before any tensor changes."""

    states: Mapping[int, Mapping[str, Any]]


class SaveShard(NamedTuple):
    """Write the optimizer's state, and on the first replica the weights, to files of ``folder`` named by ``label``."""

    folder: Path
    label: str


class ReadCheckpoint(NamedTuple):
    """Read what the worker's stages need of a checkpoint; reply with the names of their weights."""

    folder: Path
    manifest: Manifest


class ApplyCheckpoint(NamedTuple):
    """Replace the live state by what ``ReadCheckpoint`` has read, and the seed of random numbers by ``seed``."""

    seed: int


class DropCheckpoint(NamedTuple):
    """Drop what ``ReadCheckpoint`` has read, because another worker could not read its part."""


class ReleaseLayers(NamedTuple):
    """Reply with the named layers, their optimizer state and accumulated gradients, for ``Repartition`` elsewhere."""

    names: Sequence[str]


class ReceiveLayers(NamedTuple):
    """Unpickle what other workers have released; it is kept for the ``Repartition`` that follows."""

    given: Sequence[bytes]


class GetOptimizerState(NamedTuple):
    """Reply with the optimizer's state by layer and parameter."""


class Repartition(NamedTuple):
    """Rebuild the worker's stages as ``parts``, from its own layers and those received.

    ``others``: by layer, the optimizer's state that replicas held.
    """

    parts: Mapping[int, tuple[Sequence[str], int]]
    last_stage: int
    stage_links: StageLinks
    others: Mapping[str, Mapping[str, Any]]


class GetOptimizer(NamedTuple):
    """Reply with the worker's ``OptimizerPart``; ``with_state``: and its state, on the CPU."""

    with_state: bool


class LoadOptimizer(NamedTuple):
    """Replace the optimizer's groups, and its state by the parameter's name in the unsplit model."""

    groups: Sequence[Mapping[str, Any]]
    states: Mapping[str, Mapping[str, Any]]


class KeepState(NamedTuple):
    """Copy weights, buffers and the optimizer's state for ``RestoreState``; reply with the seed of random numbers."""


class RestoreState(NamedTuple):
    """Put back what ``KeepState`` has copied."""


StateOperation = (
    GetState | LoadState | SaveShard | ReadCheckpoint | ApplyCheckpoint | DropCheckpoint | KeepState | RestoreState
    | GetOptimizer | LoadOptimizer
)  # fmt: skip

StageOperation = (
    GetModule | GetParameter | CallModule | SetMetrics | SetSelection | ReleaseCaches | ReleaseLayers | ReceiveLayers
    | GetOptimizerState | Repartition
)  # fmt: skip

HoldingOperation = StageOperation | StateOperation

Operation = StepOperation | HoldingOperation | WorkerOperation


class Task(NamedTuple):
    """An operation in a worker's strict sequence, and the ports of the values that it awaits.

    In a stream a failure ends the tasks of its ``group`` and of later groups. Outside of streams ``group`` is 0.
    """

    operation: Operation
    awaits: tuple[Port, ...] = ()
    group: int = 0


# A worker, and the tasks that one call sends to it.
Call = tuple[str, list[Task]]
