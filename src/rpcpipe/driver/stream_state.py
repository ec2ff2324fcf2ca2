"""What the driver knows of a stream: the batches under way, and those that it may have to feed again."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rpcpipe.driver.program import Fed
from rpcpipe.model.batch import Batch, Size
from rpcpipe.model.microbatch import Nest
from rpcpipe.schedules.asynchronous import StreamOrder
from rpcpipe.stage import stream_rollback
from rpcpipe.stage.context import MicroBatch, StepContext
from rpcpipe.worker.messages import Update


@dataclass(kw_only=True)
class FedBatch:
    """A batch: its groups, each micro-batch's share of the batch, its size, and the RRefs to keep while it runs.

    ``parts``: its micro-batches from ``first`` on, copies that nobody changes. ``awaited``: the groups whose updates
    are awaited; all but where the stream goes on from a snapshot amid the batch. ``given``: its result was taken
    before, and it is fed again.
    """

    groups: range
    first: int
    shares: dict[int, float]
    lr: tuple[float, ...]
    size: Size
    parts: list[Fed]
    awaited: range
    held: list[object] = field(default_factory=list)
    issued: bool = False
    given: bool = False

    def to_feed(self) -> Iterator[tuple[Fed, bool]]:
        """Yield the micro-batches of the groups awaited, and whether each is its group's last."""
        for fed in self.parts:
            if fed.share.group in self.awaited:
                yield fed, fed.share.last


@dataclass(kw_only=True)
class StreamState:
    """The state of a stream since it last stood empty. Versions of the weights are counted from there.

    ``plan.step`` names the stream in every message, and is another number after it has gone on from a snapshot;
    ``stream`` is the first one. ``first``: by worker, the place in its sequence where the stream began. ``groups``: by
    micro-batch, its group. ``changes`` and ``clips``: by group, the hyperparameters, and the norm to clip to.
    ``committed``: the number of groups that have succeeded on all workers. ``replies``: by worker and group.
    ``ended``: by worker, when its last update ended, in ns of its clock. ``since``: when the last result was collected,
    in s. ``log``: if it is kept, batches that are done, from the newest snapshot on that all workers have. ``lost``:
    workers have died, and the stream must go on from that snapshot.
    """

    stream: int
    plan: StepContext
    first: dict[str, int]
    order: StreamOrder
    logs: bool
    committed: int = 0
    is_open: bool = True
    drained: bool = False
    lost: bool = False
    groups: list[int] = field(default_factory=list)
    changes: list[list[dict[str, Any]]] = field(default_factory=list)
    clips: list[float | None] = field(default_factory=list)
    hyperparameters: list[dict[str, Any]] = field(default_factory=list)
    batches: deque[FedBatch] = field(default_factory=deque)
    log: deque[FedBatch] = field(default_factory=deque)
    replies: dict[tuple[str, int], Future[Any]] = field(default_factory=dict)
    watches: list[Future[Any]] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    @property
    def base(self) -> int:
        """The number of updates before the stream."""
        return self.plan.rng_step

    @property
    def under_way(self) -> int:
        """The number of batches whose results are awaited."""
        return sum(not batch.given for batch in self.batches)

    def add(
        self,
        updates: Sequence[range],
        parts: Sequence[tuple[Nest, Nest]],
        batch: Batch,
        lr: tuple[float, ...],
        clip: float | None,
    ) -> None:
        """Add ``batch``, in ``parts`` with its targets; ``updates``: of each, the indices of its micro-batches."""
        start, first = len(self.changes), len(self.groups)
        groups = range(start, start + len(updates))
        feds = []
        for group, update in zip(groups, updates, strict=True):
            alone = len(update) == 1
            for index in update:
                weight, last = 1.0 if alone else batch.weights[index], index == update[-1]
                share = MicroBatch(self.base + group, index - update.start, weight, group, last=last, alone=alone)
                feds.append(Fed(share, *parts[index]))
                self.groups.append(group)
        self.changes += [self.hyperparameters] * len(updates)
        self.clips += [clip] * len(updates)
        by_chunk = dict(enumerate(batch.weights, first))
        self.batches.append(
            FedBatch(
                groups=groups, first=first, shares=by_chunk, lr=lr, size=batch.size, parts=feds, awaited=groups
            )
        )  # fmt: skip

    def update(self, group: int) -> Update:
        """Return the context of the update of ``group``."""
        return Update(group, self.changes[group], self.clips[group], self.committed)

    def replies_of(self, batch: FedBatch, workers: Sequence[str]) -> Mapping[tuple[str, int], Future[Any]]:
        """Return the replies to the updates of ``batch`` that are awaited, by worker and group."""
        return {(name, group): self.replies[name, group] for group in batch.awaited for name in workers}

    def finish(self, batch: FedBatch, workers: Sequence[str]) -> None:
        """Note that ``batch``, the oldest under way, is done on all workers."""
        assert self.batches.popleft() is batch
        for key in self.replies_of(batch, workers):
            del self.replies[key]
        batch.held, batch.given = [], True
        self.committed = max(self.committed, batch.groups.stop)
        if self.logs:
            self.log.append(batch)
            while self.log and self.log[0].groups.stop <= self.newest:
                self.log.popleft()

    @property
    def newest(self) -> int:
        """The number of updates in the newest snapshot that all workers have."""
        return stream_rollback.newest(self.committed)

    def restart(self, step: int, first: dict[str, int], workers: int) -> None:
        """Go on from the newest snapshot as ``step``: all batches since then are to be issued again."""
        self.plan, self.first = self.plan._replace(step=step), first
        self.order = StreamOrder(workers, bisect_left(self.groups, self.newest))
        self.batches, self.log = self.log + self.batches, deque()
        self.lost = False
        self.replies.clear()
        for batch in self.batches:
            batch.awaited = range(max(batch.groups.start, self.newest), batch.groups.stop)
            batch.held, batch.issued = [], False
