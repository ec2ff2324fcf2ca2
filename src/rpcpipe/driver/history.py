"""What a pipeline has done since its last snapshot, so that it can go on if a host is lost.

A worker that dies alone leaves its memory behind (``succession``); one that dies with its host does not. Then all
workers, wherever they live now, go back to the newest snapshot, and do again what has changed their state since: it
takes the batches, the hyperparameters and the settings that it took then, and gives the same bits, since random numbers
are a function of seed, step, micro-batch and layer. Then the call is made again in which the host died.

What cannot be done again, as the driver does not know of it (a step by hand) or because it replaces the state (a load),
cuts the history: it begins again with the next snapshot.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from rpcpipe.driver.roles import StepRecord
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.settings import Settings
from rpcpipe.driver.snapshots import Snapshots
from rpcpipe.driver.step import Step
from rpcpipe.errors import StageError, WorkerLost
from rpcpipe.model.microbatch import Nest, copied
from rpcpipe.planning.loss_cost import SNAPSHOT_SHARE
from rpcpipe.stage.progress import Progress
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.operations import Operation

log = logging.getLogger("rpcpipe")


class _Trained(NamedTuple):
    """A step that has succeeded, and what it depended on beside the workers' state."""

    number: int
    settings: Settings
    begins: bool  # an accumulation
    scaler: Mapping[str, Any] | None
    changes: Sequence[Mapping[str, Any]]
    updated: bool
    batch: tuple[Nest, Nest]


class _Called(NamedTuple):
    """An operation that workers have executed."""

    workers: Sequence[str]
    operation: Operation


class History:
    """The history of one pipeline. ``behind``: the workers are in a state of the past, on the way to now.

    ``restored``: how often they have gone back.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.behind = False
        self.restored = 0
        self._runtime = runtime
        self._snapshots = Snapshots(runtime.cluster, runtime.driver)
        self._log: list[_Trained | _Called] = []
        self._mark = 0  # what was in the log when the snapshot under way was taken
        self._whole = False  # the log leads from the newest snapshot to now
        self._next = 0.0  # when a snapshot is due

    @property
    def _runs(self) -> bool:
        """Whether there is a history at all: where a host may die alone, and its state can be known."""
        cluster, spec = self._runtime.cluster, self._runtime.spec
        return (
            cluster.spread and spec.keep and self._runtime.policy is None and not self._snapshots.refusal
            and self._snapshots.possible
        )  # fmt: skip

    @property
    def due(self) -> bool:
        """Whether a snapshot is to be taken after the step under way, which no other may follow before."""
        return not self.behind and not self._snapshots.pending and time.monotonic() >= self._next and self._runs

    @property
    def safe(self) -> bool:
        """Whether the pipeline can go on whichever host is lost now."""
        return self._runs and self._whole and self._snapshots.safe

    @property
    def leads_to_now(self) -> bool:
        """Whether all workers can go back to a snapshot and do again what followed."""
        if self._snapshots.pending:
            self._settle()
        return self._whole and self._runs

    # --- what happens ---

    def trained(self, step: StepRecord) -> None:
        """Note a step that has succeeded."""
        if self.behind or not self._runs:
            return
        if step.batch is None:
            self._cut()  # by hand
            return
        runtime = self._runtime
        inputs, targets = step.batch
        self._log.append(
            _Trained(
                number=step.number, settings=runtime.settings, begins=not step.progress.done,
                scaler=None if runtime.scaler is None else runtime.scaler.state_dict(),
                changes=step.changes, updated=step.updated, batch=(copied(inputs), copied(targets)),
            )
        )  # fmt: skip

    def called(self, workers: Sequence[str], operation: Operation) -> None:
        """Note an operation that workers have executed and that has changed them."""
        if self._runs and not self.behind:
            self._log.append(_Called(workers, operation))

    def cut(self) -> None:
        """Note that the state changes as no log says: a snapshot is due, and there is no history until it is taken."""
        self._cut()
        self._next = 0.0

    def begin_anew(self) -> None:
        """Note, between two calls, that the state has been replaced: take a snapshot of it."""
        self.cut()
        self.tick()

    def _cut(self) -> None:
        self._log.clear()
        self._whole = False
        self._snapshots.give_up()

    def tick(self) -> None:
        """Between two calls: take a snapshot if one is due, and notice that one is complete."""
        if self._snapshots.pending:
            self._settle()
        if self.due and self._runtime.progress.done == 0 and self._runtime.driver.ahead is None:
            self._mark = len(self._log)
            self._snapshots.take()

    def _settle(self) -> None:
        if self._snapshots.settle():
            del self._log[: self._mark]
            self._whole = True
            self._next = time.monotonic() + self._snapshots.seconds / SNAPSHOT_SHARE
        elif (failure := self._snapshots.refusal) is not None:
            log.warning(
                "if a host dies its workers cannot be replaced: %s cannot take a snapshot: %s",
                failure.worker, failure.message,
            )  # fmt: skip

    # --- going on ---

    def lose(self) -> None:
        """Note that a worker has been replaced: what it was to send of a snapshot is gone."""
        self._snapshots.give_up()

    def restore(self) -> None:
        """Have all workers go back to the newest snapshot and do again what followed.

        Raises WorkerLost where there is no history, or if another worker dies.
        """
        if not self.leads_to_now:
            raise WorkerLost(f"a host has died and what its workers held cannot be restored: {self._reason()}")
        runtime, begun = self._runtime, time.monotonic()
        self.behind = True
        self._snapshots.give_up()
        try:
            runtime.succession.restart(self._snapshots.bring())
            with self._as_then():
                for entry in self._log:
                    self._do_again(entry)
        except StageError as error:
            raise WorkerLost(f"a host has died, and what followed the newest snapshot cannot be done again: {error}") \
                from error  # fmt: skip
        self.behind, self._next = False, 0.0
        self.restored += 1
        log.warning("a host was lost: all workers went back to the newest snapshot and did again %d steps or calls,"
                    " within %.2f s", len(self._log), time.monotonic() - begun)  # fmt: skip

    def _reason(self) -> str:
        runtime = self._runtime
        if runtime.policy is not None:
            return f"{runtime.schedule.name!r} streams, of which there are no snapshots"
        if (failure := self._snapshots.refusal) is not None:
            return f"{failure.worker} cannot take a snapshot: {failure.message}"
        return "no other host has a snapshot of them and of all that followed"

    @contextmanager
    def _as_then(self) -> Iterator[None]:
        """Let the driver's state be that of each step in turn; afterwards it is as before."""
        runtime = self._runtime
        names = "tracer", "settings", "trained", "busy"
        before, progress = {name: getattr(runtime, name) for name in names}, runtime.progress
        scale = None if runtime.scaler is None else runtime.scaler.state_dict()
        runtime.tracer = None
        try:
            with runtime.nothing_active():
                yield
            if progress.done:  # the step that has accumulated last has another number now
                progress = runtime.progress
        finally:
            runtime.optimizer.past = None
            runtime.progress = progress
            for name, value in before.items():
                setattr(runtime, name, value)
            if runtime.scaler is not None and scale is not None:
                runtime.scaler.load_state_dict(scale)

    def _do_again(self, entry: _Trained | _Called) -> None:
        runtime = self._runtime
        if isinstance(entry, _Called):
            runtime.driver.collect({name: runtime.driver.call(name, entry.operation) for name in entry.workers})
            return
        runtime.settings, runtime.trained = entry.settings, entry.number
        if entry.begins:
            runtime.progress = Progress(entry.settings.accumulate)
        if runtime.scaler is not None and entry.scaler is not None:
            runtime.scaler.load_state_dict(dict(entry.scaler))
        runtime.optimizer.past = list(map(dict, entry.changes))
        with shield_interrupts(), Step(runtime, entry.number, updates_at_once=entry.updated) as step:
            step.run(*entry.batch)
            if entry.updated:
                step.apply()

    def close(self) -> None:
        """Let go of everything."""
        self._log.clear()
        self._snapshots.close()
