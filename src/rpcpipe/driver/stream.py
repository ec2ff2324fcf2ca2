"""Asynchronous training: minibatches follow each other through the stages without a flush.

The driver feeds batches ahead of those that it collects, so the workers never wait for the driver. For the
mailboxes a stream is one step without end. The unit of success and failure is the group: the micro-batches of
one update. Versions are counted from where the stream last stood empty.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from rpcpipe.driver.callbacks import tell
from rpcpipe.driver.inference import NOTHING, Wanted
from rpcpipe.driver.optimizer import check_alike
from rpcpipe.driver.program import Fed
from rpcpipe.driver.result import StreamedBatch, StreamResult, last_update
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.tracing import spans
from rpcpipe.errors import Failure, NonFiniteError, RpcPipeError, ScheduleError, StageError, WorkerLost
from rpcpipe.model.layers import check_inputs
from rpcpipe.model.microbatch import Nest, copied
from rpcpipe.schedules import Action, Timeline
from rpcpipe.schedules.action import NAMES
from rpcpipe.schedules.asynchronous import StreamOrder
from rpcpipe.schedules.weight_versions import Policy
from rpcpipe.stage import stream_rollback
from rpcpipe.stage.context import MicroBatch, StepContext
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.messages import Report, Update
from rpcpipe.worker.operations import BeginStep, EndStream, Task

log = logging.getLogger("rpcpipe")


@dataclasses.dataclass
class _Batch:
    """A batch under way: its groups, each micro-batch's share of the batch, and the RRefs to keep meanwhile."""

    groups: range
    shares: dict[int, float]
    held: list[object]
    lr: tuple[float, ...]


@dataclasses.dataclass(kw_only=True)
class StreamState:
    """The state of a stream since it last stood empty. Versions of the weights are counted from there.

    ``step`` names the stream in every message. ``first``: by worker, the place in its sequence where the stream
    began. ``base``: the number of updates before the stream. ``groups``: by micro-batch, its group. ``changes``: by
    group, the hyperparameters. ``committed``: the number of groups that have succeeded on all workers. ``ended``: by
    worker, when its last update ended, in ns of its clock. ``since``: when the last result was collected, in s.
    """

    step: int
    first: dict[str, int]
    base: int
    order: StreamOrder
    policy: Policy
    committed: int = 0
    is_open: bool = True
    drained: bool = False
    groups: list[int] = dataclasses.field(default_factory=list)
    changes: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list)
    hyperparameters: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    batches: deque[_Batch] = dataclasses.field(default_factory=deque)
    replies: dict[tuple[str, int], Future[Any]] = dataclasses.field(default_factory=dict)
    watches: list[Future[Any]] = dataclasses.field(default_factory=list)
    ended: dict[str, int] = dataclasses.field(default_factory=dict)
    since: float = dataclasses.field(default_factory=time.perf_counter)


class Stream:
    """Streams batches through a pipeline; ``results`` are the collected results that the caller has not taken."""

    def __init__(self, runtime: Runtime, wanted: Wanted = NOTHING) -> None:
        self.results: deque[StreamResult] = deque()
        self._runtime, self._wanted = runtime, wanted
        self._state: StreamState | None = None
        # The number of batches fed before the oldest is awaited: as many micro-batches as there are stages fill the
        # pipeline, and two more hide the driver's time.
        self._ahead = -(-(len(runtime.names) + 2) // runtime.chunks)

    def run(self, batches: Iterable[tuple[Nest, Nest]], flush_every: int | None) -> Generator[StreamResult, None, None]:
        """Feed all ``batches`` and yield their results in order, some batches later.

        ``flush_every``: the number of batches after which the pipeline is drained, None for never.
        """
        try:
            for count, (inputs, targets) in enumerate(batches, 1):
                self.feed(inputs, targets)
                if flush_every is not None and count % flush_every == 0:
                    self.flush()
                while self.results or (self._is_open and len(self._open.batches) > self._ahead):
                    yield self.take()
        except KeyboardInterrupt:
            with shield_interrupts():
                self._drain()  # the batches fed so far will be done; the next call waits for them
            raise
        except BaseException:  # the caller leaves the loop, or the iterator of batches has raised
            self.flush()
            while self.results:
                self.take()
            raise
        self.flush()
        while self.results:
            yield self.take()

    def take(self) -> StreamResult:
        """Return the oldest result, and call the callbacks with it."""
        result = self.results.popleft() if self.results else self._collect()
        tell(self._runtime.callbacks, result)
        return result

    # --- feeding ---

    def feed(self, inputs: Nest, targets: Nest) -> None:
        """Issue all actions that one more batch makes possible.

        Raises ArgumentError if inputs and targets differ in size or a named value is missing.
        """
        runtime = self._runtime
        cut = runtime.program.cut(copied(inputs))
        parts, shares = cut.parts, cut.weights
        target_parts = runtime.program.cut_targets(runtime.prepare(copied(targets)), cut)
        check_inputs(parts[0], runtime.deployment.wirings)
        with shield_interrupts():
            if not self._is_open:
                runtime.check()
                self._begin()
            runtime.enter(self)
            try:
                runtime.optimizer.step()  # calls apply; learning-rate schedulers count the calls
            finally:
                runtime.leave(self)
            state, policy = self._open, self._open.policy
            updates, first = policy.updates(len(parts)), len(state.changes)
            batch = _Batch(range(first, first + len(updates)), {}, [], runtime.optimizer.lr)
            state.changes += [state.hyperparameters] * len(updates)
            state.batches.append(batch)
            for group, update in zip(batch.groups, updates, strict=True):
                for index in update:
                    state.groups.append(group)
                    batch.shares[state.order.fed] = shares[index]
                    fed = Fed(self._micro_batch(group, update, index, shares), parts[index], target_parts[index])
                    self._issue(state.order.feed(last=index == update[-1]), fed, batch.held)
        if policy.must_drain(len(parts), len(runtime.names)):
            self.flush()

    def _micro_batch(self, group: int, update: range, index: int, shares: Sequence[float]) -> MicroBatch:
        """Return the parameters of micro-batch ``index`` of a batch, one of those of ``update``."""
        alone, step = len(update) == 1, self._open.base + group
        weight = 1.0 if alone else shares[index]
        return MicroBatch(step, index - update.start, weight, group, last=index == update[-1], alone=alone)

    def apply(self) -> None:
        """Take the optimizer's hyperparameters for the batch being fed; called by ``pipe.optimizer.step()``."""
        self._open.hyperparameters = self._runtime.optimizer.changes()

    def forget(self) -> None:
        """Do nothing: a stream accumulates no gradients over calls."""

    def lose(self) -> None:
        """Do nothing: a stream is active only while it is fed, and collecting notices the loss."""

    def abandon(self) -> None:
        """Forget the stream without sending a message, because the pipeline is closed."""
        if self._state is not None:
            self._state.is_open = False

    @property
    def _is_open(self) -> bool:
        return self._state is not None and self._state.is_open

    @property
    def _open(self) -> StreamState:
        """The state since the stream last stood empty."""
        assert self._state is not None
        return self._state

    def _begin(self) -> None:
        """Start the stream on all workers. Raises ScheduleError if the pipeline's schedule is synchronous now."""
        runtime = self._runtime
        if runtime.policy is None:
            raise ScheduleError(
                f"the schedule has become {runtime.schedule.name!r}, which does not stream; leave the loop over"
                " pipe.train first and begin another"
            )
        runtime.check_policy(runtime.policy)
        state = StreamState(
            step=runtime.driver.new_step(),
            first=runtime.driver.places(),
            base=runtime.trained,
            order=StreamOrder(len(runtime.names)),
            policy=runtime.policy,
        )
        plan = StepContext(
            state.step, state.base, True, (), trace=runtime.tracer is not None, policy=runtime.policy,
            stop=runtime.settings.nonfinite == "stop", measures=self._wanted.measures,
            keep_outputs=self._wanted.outputs,
        )  # fmt: skip
        for name in runtime.names:
            runtime.driver.send(name, state.step, Task(BeginStep(plan)))
        state.watches = runtime.driver.watch(state.step)
        self._state, runtime.stream = state, self

    def _issue(self, actions: list[tuple[int, Action]], fed: Fed | None, held: list[object]) -> None:
        """Send ``actions``, with ``fed`` as the forwards' micro-batch, and add the RRefs to keep to ``held``."""
        runtime, state = self._runtime, self._open

        def update(group: int) -> Update:
            return Update(group, state.changes[group], runtime.settings.clip_grad_norm, state.committed)

        calls = runtime.program.stream(actions, state.groups, fed, update)
        handles, replies = runtime.driver.feed(state.step, calls)
        held += handles
        state.replies |= replies

    def _drain(self) -> None:
        """Issue all actions that finish the batches fed so far."""
        if self._is_open and not self._open.drained:
            self._open.drained = True
            self._issue(self._open.order.drain(), None, self._open.batches[-1].held if self._open.batches else [])

    # --- collecting ---

    def flush(self) -> None:
        """Drain the pipeline. Afterwards all stages have the same updates and one version of the weights."""
        if not self._is_open:
            return
        with shield_interrupts():
            self._drain()
            while self._open.batches:
                self.results.append(self._collect())
            self._close(None)

    def _collect(self) -> StreamResult:
        """Wait for the oldest batch and return its result; end the stream after an error."""
        runtime, batch = self._runtime, self._open.batches[0]
        wanted = {(name, group): self._open.replies[name, group] for group in batch.groups for name in runtime.names}
        with shield_interrupts():
            try:
                reports = runtime.driver.collect(wanted, self._open.watches)
                for group in batch.groups:
                    check_alike({name: reports[name, group].updated.changed for name in runtime.names})
            except StageError as error:
                raise self._stop(error) from None
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._abort(error)
                raise
            self._open.batches.popleft()
            for key in wanted:
                del self._open.replies[key]
            self._open.committed = batch.groups.stop
            runtime.trained = self._open.base + self._open.committed
            return self._result(batch, reports)

    def _result(self, batch: _Batch, reports: Mapping[tuple[str, int], Report]) -> StreamResult:
        """Return the result of ``batch``; ``reports``: by worker and group."""
        runtime, number = self._runtime, self._open.base + batch.groups.start
        since, self._open.since = self._open.since, time.perf_counter()
        by_worker = {name: Report.joined([reports[name, group] for group in batch.groups]) for name in runtime.names}
        streamed = StreamedBatch(self._open.base, batch.groups, batch.shares, batch.lr)
        updates = [[reports[name, group] for name in runtime.names] for group in batch.groups]
        measured = spans(by_worker, runtime.offsets, number)
        timeline = Timeline(measured, workers=len(by_worker), name=runtime.schedule.name)
        result = StreamResult.of_batch(
            batch=streamed,
            reports=by_worker,
            updates=updates,
            timeline=timeline,
            seconds=self._open.since - since,
            ended=self._open.ended,
        )
        self._open.ended |= {name: last_update(report) for name, report in by_worker.items()}
        if not result.applied:
            log.warning("step %d: loss or gradient is not finite; %d updates skipped", number, result.skipped)
        if runtime.tracer is not None:
            runtime.tracer.step(by_worker, number)
        runtime.note(result.timeline)
        return result

    # --- ending ---

    def _close(self, updates: int | None) -> None:
        """End the stream on all workers. ``updates``: first restore the state after this number of updates."""
        runtime = self._runtime
        self._open.is_open, runtime.stream = False, None
        runtime.driver.cancel(self._open.step, runtime.driver.places())
        runtime.driver.collect({name: runtime.driver.call(name, EndStream(updates)) for name in runtime.names})

    def _stop(self, error: StageError) -> RpcPipeError:
        """Finish the groups before the failed one on all stages and end the stream; return the error to raise.

        If the stages have done different numbers of groups by then, all return to their newest common snapshot.
        """
        runtime, driver = self._runtime, self._runtime.driver
        group = self._open.committed if error.chunk is None else self._open.groups[error.chunk]
        try:
            with shield_interrupts():
                driver.abandon(self._open.step, group)
                self._drain()
                outcomes = driver.outcomes(self._open.replies)
                done = {self._leading(name, outcomes) for name in runtime.names}
                common = done.pop() if len(done) == 1 and not any(map(_is_halfway, outcomes.values())) else None
                updates = stream_rollback.newest(self._open.committed) if common is None else common
                self._close(updates if common is None else None)
        except BaseException as second_error:
            self._abort(second_error)
            raise
        return StageError.of(dataclasses.replace(error.failure, after=self._account(updates)))

    def _leading(self, name: str, outcomes: Mapping[tuple[str, int], Any]) -> int:
        """Return the number of groups, counted without a gap, that the worker has done."""
        group = self._open.committed
        while not isinstance(outcomes.get((name, group), Failure.cancel(name, "")), Failure):
            group += 1
        return group

    def _abort(self, error: BaseException) -> None:
        """End the stream after an error that leaves the workers' progress unknown.

        All stages restore the newest snapshot that all of them hold, successors of dead workers from what those have
        kept; nothing is sent if a worker stays lost.
        """
        runtime = self._runtime
        self._open.is_open, runtime.stream = False, None
        if isinstance(error, WorkerLost) and runtime.cluster.heal:
            with suppress(WorkerLost):
                runtime.check()
        if not runtime.cluster.healthy or runtime.succession.is_broken:
            return
        with shield_interrupts():
            updates = stream_rollback.newest(self._open.committed)
            runtime.driver.cancel(self._open.step, self._open.first)
            for name in runtime.names:
                runtime.driver.call(name, EndStream(updates))
            error.add_note(self._account(updates))

    def _account(self, updates: int) -> str:
        """Set ``trained`` and return a text for users on which minibatches are in the weights."""
        runtime = self._runtime
        runtime.trained = self._open.base + updates
        fed, unit = self._open.base + len(self._open.changes), self._open.policy.unit
        return (
            f"On every stage the {unit} before number {runtime.trained} (pipe.trained) are in the weights and"
            f" numbers {runtime.trained} to {fed - 1} are not; the stream has ended and the pipeline is usable."
            " Mend the cause and feed those again."
        )


def _is_halfway(outcome: Any) -> bool:
    """Return whether ``outcome`` is an optimizer's failure, which leaves some parameters updated and some not.

    A gradient that is not finite fails the update before it begins.
    """
    return (
        isinstance(outcome, Failure)
        and not outcome.cancelled
        and outcome.action == NAMES["U"]
        and outcome.qualname != NonFiniteError.__qualname__
    )
