"""Have workers read batches, and compare what they have read before anything is computed from it."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from rpcpipe.driver.deployment import Deployment
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.remote_batches import RemoteBatches, RemoteValue
from rpcpipe.errors import ArgumentError, StageError, StateError, require
from rpcpipe.model.batch import Batch
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.wiring import DRIVER
from rpcpipe.transport.user_pickling import named_dumps
from rpcpipe.worker.messages import CHANGED, BatchInfo, BatchRef, ReadAnswer, ReadOrder, ReadPart, Source

# Sources that workers keep: batches to train on, and to evaluate on in between. Another one is begun anew.
_SOURCES = 4


class _Reading(NamedTuple):
    """Who reads for which stage, and whether with targets."""

    worker: str
    stage: int
    targets: bool

    def __str__(self) -> str:
        return f"{self.worker} (stage {self.stage})"


# A batch, and who reads it.
_Asked = tuple[BatchRef, tuple[_Reading, ...]]


class Readers:
    """Asks one pipeline's workers to read batches."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._sources: OrderedDict[int, Source] = OrderedDict()
        self._said: OrderedDict[_Asked, BatchInfo | None] = OrderedDict()

    def forget(self) -> None:
        """Ask again for every batch: a worker has been replaced, and its successor has read nothing."""
        self._said.clear()

    def has(self, deployment: Deployment, inputs: RemoteValue) -> bool:
        """Return whether there is the batch of ``inputs``; the workers have read it then. Raises as ``cut`` does."""
        self._note(inputs.source)
        return self._info(deployment, _ref(deployment, inputs), targets=inputs.what == "inputs") is not None

    def cut(self, deployment: Deployment, inputs: Nest, targets: Nest) -> tuple[Batch, list[Nest]]:
        """Return what stands for a batch's micro-batches, and for their targets.

        Raises StageError for what is raised on a worker, and ArgumentError if there is no such batch, or if workers
        have read different ones.
        """
        require(
            isinstance(inputs, RemoteValue) and inputs.belongs_to(targets),
            "of rp.RemoteBatches a step takes both, the inputs and the targets of one batch:"
            " pipe.train_step(*batches.batch(n))",
        )
        assert isinstance(inputs, RemoteValue)
        batch = self._cut(deployment, inputs, targets=True)
        return batch, [part._replace(slot="target") for part in batch.parts]

    def cut_inputs(self, deployment: Deployment, inputs: RemoteValue) -> Batch:
        """Return what stands for the micro-batches of a batch without targets; raises as ``cut`` does."""
        require(inputs.what != "targets", "pipe(inputs) takes the inputs of rp.RemoteBatches: pipe(batches.inputs(n))")
        return self._cut(deployment, inputs, targets=False)

    def _cut(self, deployment: Deployment, inputs: RemoteValue, *, targets: bool) -> Batch:
        self._note(inputs.source)
        ref = _ref(deployment, inputs)
        info = self._info(deployment, ref, targets=targets)
        if info is None:
            raise ArgumentError(f"{inputs.source!r} has no batch {inputs.number}: it ends before")
        require(inputs.digest in (None, info.digest), CHANGED.format(inputs.number), error=StateError)
        inputs.digest = info.digest
        parts = [ReadPart(ref, info.digest, chunk, "input") for chunk in range(len(info.weights))]
        return Batch(parts, info.weights, info.counts, info.samples, info.by_caller, info.tokens)

    def ensure(self, deployment: Deployment, part: Nest) -> None:
        """Have the batch of ``part``, if it stands for one, read by workers that have not. Raises as ``cut`` does."""
        if isinstance(part, ReadPart):
            self._info(deployment, part.ref, targets=True)

    def _note(self, batches: RemoteBatches) -> None:
        """Note that ``batches`` are used, and pickle what makes them."""
        if batches.key not in self._sources:
            make = named_dumps(batches.make, "make of rp.RemoteBatches")
            self._sources[batches.key] = Source(make, batches.seed)
        self._sources.move_to_end(batches.key)
        while len(self._sources) > _SOURCES:
            self._sources.popitem(last=False)

    def _info(self, deployment: Deployment, ref: BatchRef, *, targets: bool) -> BatchInfo | None:
        """Return what all readers of a batch say of it; None if all have none."""
        asked, keep = (ref, _readings(deployment, targets=targets)), _keep(deployment)
        if asked not in self._said:
            self._said[asked] = _agreed(ref, self._ask(asked, keep))
            while len(self._said) > keep:  # as long as workers hold it
                self._said.popitem(last=False)
        return self._said[asked]

    def _ask(self, asked: _Asked, keep: int) -> dict[_Reading, BatchInfo | None]:
        """Have all readers read a batch; those that do not know the source are sent it."""
        ref, left = asked
        answers: dict[_Reading, ReadAnswer] = {}
        for source in None, self._source(ref):
            orders = {one: ReadOrder(ref, one.stage, one.targets, source, tuple(self._sources), keep) for one in left}
            replies = {one: self._driver.ask(one.worker, "read", order) for one, order in orders.items()}
            try:
                answers |= self._driver.collect(replies)
            except StageError as error:
                after = (
                    "Nothing was computed from this batch, and the pipeline is usable; mend the cause and go on with"
                    f" rp.RemoteBatches(make, start={ref.number})."
                )
                raise StageError.of(dataclasses.replace(error.failure, after=after)) from None
            left = tuple(one for one in left if not answers[one].known)
        return {one: answer.info for one, answer in answers.items()}

    def _source(self, ref: BatchRef) -> Source:
        require(
            ref.source in self._sources,
            f"more than {_SOURCES} rp.RemoteBatches are under way in one stream, and the oldest is needed again after a"
            " death; use them one after the other",
            error=StateError,
        )
        return self._sources[ref.source]


def _ref(deployment: Deployment, value: RemoteValue) -> BatchRef:
    replicas, chunks = deployment.layout.replicas, deployment.schedule.chunks
    return BatchRef(value.source.key, value.number, value.what != "batch", replicas, chunks)


def _keep(deployment: Deployment) -> int:
    """Return how many batches may be under way: as many as fill the pipeline, one more, and the one that is read."""
    return -(-(deployment.layout.pipeline_size + 2) // deployment.schedule.chunks) + 2


def _readings(deployment: Deployment, *, targets: bool) -> tuple[_Reading, ...]:
    """Return who reads a batch: the workers of the stages that the driver would send it to."""
    schedule, last = deployment.schedule, deployment.schedule.stages - 1
    stages = {0, *(route.target for route in deployment.value_routes if route.source == DRIVER)}
    stages |= {last} if targets else set()
    found: dict[str, _Reading] = {}
    for stage in sorted(stages):
        for worker in deployment.layout.replicas_of(schedule.placement[stage]):
            first = found.get(worker, _Reading(worker, stage, targets=False))
            found[worker] = first._replace(targets=first.targets or (targets and stage == last))
    return tuple(found.values())


def _agreed(ref: BatchRef, infos: Mapping[_Reading, BatchInfo | None]) -> BatchInfo | None:
    """Return what all say; raises ArgumentError if they differ."""
    (first, info), *others = infos.items()
    for one, other in others:
        if other != info:
            raise ArgumentError(
                f"workers have read different batches {ref.number} of rp.RemoteBatches: {first} {_said(info)}, and"
                f" {one} {_said(other)}. make() must give the same on every worker: seed what shuffles"
                " (torch.Generator().manual_seed(…), sampler.set_epoch), sort names of files, read the same ones."
                " Nothing was computed from this batch"
            )
    return info


def _said(info: BatchInfo | None) -> str:
    if info is None:
        return "has no more"
    return f"one of {sum(info.samples):g} samples with the checksum {info.digest:08x}"
