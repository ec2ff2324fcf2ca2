"""The values that travel between the driver and the workers.

Those that a step carries by the hundred are named tuples, which pickle fastest; ``Report`` and ``StageInfo``, one for
each worker or stage, are dataclasses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rpcpipe.model.microbatch import Packed
from rpcpipe.schedules import Action
from rpcpipe.stage.autograd import StageInput
from rpcpipe.stage.hyperparameters import Groups
from rpcpipe.stage.metrics import Sums
from rpcpipe.stage.progress import Progress


class Bucket(NamedTuple):
    """Some parameters of a group, whose gradients or weights its members exchange in one message."""

    group: str
    number: int

    def describe(self) -> str:
        """Name the bucket for a user: ``bucket 1 of stage 0``."""
        return f"bucket {self.number} of {self.group}"


class StepEnd(NamedTuple):
    """The end of a step, where workers tell each other what decides on the update (``agreement``)."""

    def describe(self) -> str:
        """Name it for a user."""
        return "the step's update"


class Port(NamedTuple):
    """The destination of a value: a slot of an action, of a task that exchanges a bucket, or of the step's end.

    ``slot`` of an action is "input", "target", "inputs" (named values from the driver) or "value of stage …";
    of a bucket "gradients from …", "sums", "weights", "statistics from …" or "buffers"; of the step's end "losses
    from …", "norms from …" or "orders".
    """

    action: Action | Bucket | StepEnd
    slot: str


class Orders(NamedTuple):
    """What an update needs from the driver.

    ``changes``: per parameter group the hyperparameters set there. ``progress``: that of the accumulation before the
    step.
    """

    changes: Sequence[Mapping[str, Any]]
    progress: Progress


ORDERS = Port(StepEnd(), "orders")

# A value of tensors alone: whether gradients go back for them (None for gradients), and the tensors.
TensorsAlone = tuple[list[bool] | None, list[torch.Tensor]]


def as_tensors(value: Any) -> TensorsAlone | None:
    """Return a stage's output or gradients as a list of tensors; None if there is more to it."""
    if type(value) is StageInput:
        x, named = value.nest
        return None if named or value.aliased or type(x) is not torch.Tensor else (value.wants_grad, [x])
    return (None, value) if type(value) is list and all(type(item) is torch.Tensor for item in value) else None


def from_tensors(wants_grad: list[bool] | None, tensors: list[torch.Tensor]) -> StageInput | list[torch.Tensor]:
    """Return the value of ``as_tensors``."""
    return tensors if wants_grad is None else StageInput((tensors[0], {}), wants_grad)


class Send(NamedTuple):
    """The worker and the port that receive a stage's result for ``link``, its connection with another stage."""

    link: str
    worker: str
    port: Port


class Route(NamedTuple):
    """An action, the ports of the values that it awaits, and the destinations of its results."""

    action: Action
    awaits: tuple[Port, ...]
    sends: tuple[Send, ...]


class Update(NamedTuple):
    """An update in a stream: per parameter group the hyperparameters set on the driver, and the norm to clip to.

    The updates of groups before ``committed`` have been done on all stages.
    """

    group: int
    changes: Sequence[Mapping[str, Any]]
    clip: float | None
    committed: int


class Updated(NamedTuple):
    """An update of the weights: when it began and ended in ns, and what the optimizer has changed in its groups."""

    start: int = 0
    end: int = 0
    changed: Sequence[Mapping[str, Any] | None] = ()


class Norms(NamedTuple):
    """The 2-norms of a worker's gradients by stage and the parameter's index in it, and their precision."""

    norms: Mapping[int, Mapping[int, float]]
    dtype: torch.dtype

    @property
    def finite(self) -> bool:
        """Whether every gradient is finite."""
        return all(math.isfinite(norm) for stage in self.norms.values() for norm in stage.values())


@dataclass(kw_only=True)
class Report:
    """One worker's figures of a step, or in a stream of its actions since its last update.

    ``losses`` holds (value, count) per micro-batch on the last stage, with count None for a mean, and
    ``metrics`` the metrics' sums there. ``input_grads`` holds the gradients of values that the driver has sent, by
    (stage, micro-batch). ``norms`` holds the 2-norm of every gradient that
    this worker sums, by stage and the parameter's index in it. ``spans`` holds (kind, stage, chunk, start,
    end, version) in nanoseconds of the worker's monotonic clock, with version -1 outside of streams.
    Where the step is traced, ``sends`` holds (producer, port, time) of the values sent to other workers and
    ``arrivals`` (port, time) of the values received from other workers. ``norm_dtype`` is the precision of the
    norms; ``overflowed`` says whether one was not finite before the gradients were divided by the batch's count, as
    GradScaler judges: a count of 0 makes NaN but is no overflow of the scale. ``updated`` is the last update, if any.
    """

    worker: str
    losses: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    outputs: dict[int, Packed] = field(default_factory=dict)
    metrics: dict[int, Sums] = field(default_factory=dict)
    input_grads: dict[tuple[int, int], list[torch.Tensor | None]] = field(default_factory=dict)
    norms: dict[int, dict[int, float]] = field(default_factory=dict)
    norm_dtype: torch.dtype = torch.float32
    overflowed: bool = False
    updated: Updated = field(default_factory=Updated)
    spans: list[tuple[str, int, int, int, int, int]] = field(default_factory=list)
    sends: list[tuple[Action, Port, int]] = field(default_factory=list)
    arrivals: list[tuple[Port, int]] = field(default_factory=list)
    peak_in_flight: dict[int, int] = field(default_factory=dict)
    peak_bytes: dict[int, int] = field(default_factory=dict)
    recomputed: dict[int, int] = field(default_factory=dict)
    versions: dict[int, tuple[int, int]] = field(default_factory=dict)  # (peak count, bytes of one version)
    skipped: bool = False

    @property
    def gradient_norms(self) -> Norms:
        """The norms with their precision."""
        return Norms(self.norms, self.norm_dtype)

    @classmethod
    def joined(cls, reports: Sequence[Report]) -> Report:
        """Return one worker's ``reports`` as one; the peaks, which only grow, are the last report's."""
        last = reports[-1]
        joined = cls(
            worker=last.worker, peak_in_flight=last.peak_in_flight, versions=last.versions,
            peak_bytes=last.peak_bytes, recomputed=last.recomputed,
        )  # fmt: skip
        for report in reports:
            joined.losses |= report.losses
            joined.outputs |= report.outputs
            joined.metrics |= report.metrics
            joined.spans += report.spans
            joined.sends += report.sends
            joined.arrivals += report.arrivals
        return joined


CHANGED = (
    "batch {} of rp.RemoteBatches was another one when it was read again: make() must give the same batches whenever it"
    " is called; seed what shuffles"
)


class BatchRef(NamedTuple):
    """Batch ``number`` of the RemoteBatches ``source``, as it is cut for ``replicas`` and ``chunks``.

    ``paired``: what is read is (inputs, targets), else inputs alone.
    """

    source: int
    number: int
    paired: bool
    replicas: int
    chunks: int


class ReadPart(NamedTuple):
    """Stands in a message for what a stage gets of micro-batch ``chunk``, which its worker has read.

    ``digest``: the batch's when the driver compared it. ``slot``: "input", the inputs and those of them that are
    ``names``; "inputs", these alone; or "target".
    """

    ref: BatchRef
    digest: int
    chunk: int
    slot: str
    names: tuple[str, ...] = ()


class Source(NamedTuple):
    """What a worker reads: the pickled ``make``, and the ``seed`` of random numbers in it."""

    make: bytes
    seed: int


class ReadOrder(NamedTuple):
    """Asks a worker to read a batch, for ``stage``, if it needs them with ``targets``.

    ``source``: None if the worker should know it. ``sources``: those that may be asked for again; others are dropped.
    ``keep``: the number of batches of a source that may be under way.
    """

    ref: BatchRef
    stage: int
    targets: bool
    source: Source | None
    sources: tuple[int, ...]
    keep: int


class BatchInfo(NamedTuple):
    """A batch that was read: what ``model.batch.Batch`` says of it, and the ``digest`` of all that is in it."""

    weights: tuple[float, ...]
    counts: tuple[int, ...]
    samples: tuple[float, ...]
    by_caller: bool
    tokens: int
    digest: int


class ReadAnswer(NamedTuple):
    """Answers a ReadOrder. ``info``: None if there is no such batch; ``known``: False if the source is not known."""

    info: BatchInfo | None
    known: bool = True


class OptimizerPart(NamedTuple):
    """A worker's part of the optimizer.

    ``groups``: the entries of its groups, and ``used``: whether each has a parameter of this worker. ``members``: by
    stage, in the model's order, each trainable parameter's shape and its group, None for one that another replica
    updates. ``states``: by name.
    """

    groups: Groups
    used: list[bool]
    members: dict[int, dict[str, tuple[tuple[int, ...], int | None]]]
    states: dict[str, dict[str, Any]]


class KeptAt(NamedTuple):
    """Where a worker's state is that outlives it: the memory of its ``descriptor``, while process ``pid`` lives."""

    pid: int
    descriptor: int


@dataclass(frozen=True, kw_only=True)
class StageInfo:
    """A worker's description of a stage that it holds.

    ``sizes``: the number of parameters of each layer. ``trainable``: the names of the parameters that require
    gradients. ``bytes``: the size of all parameters. ``buffered``: whether the stage has buffers. ``groups``: the
    optimizer's hyperparameters by parameter group. ``wired``: whether layers of the stage take or give named values.
    ``sharded``: whether the replicas' optimizers are sharded. ``buckets``: by bucket of gradients, the index of the
    replica that sums it. ``tied``: by tied weight, the index of its parameter group. ``kept_at``: the memory of all of
    the worker's stages, if they are kept.
    """

    layers: list[str]
    sizes: dict[str, int]
    trainable: list[str]
    parameters: int
    bytes: int
    buffered: bool
    device: str
    groups: list[dict[str, Any]]
    wired: bool
    sharded: bool
    buckets: list[int]
    tied: dict[str, int]
    kept_at: KeptAt | None = None
