"""Asynchronous training: minibatches follow each other through the stages without a flush.

The driver feeds batches ahead of those that it collects, so the workers never wait for the driver. For the
mailboxes a stream is one step without end. The unit of success and failure is the group: the micro-batches of
one update. Versions are counted from where the stream last stood empty.

Where workers are replaced, the driver keeps its copies of the batches since the newest snapshot that all workers have.
When one dies, all go back to that snapshot, and what follows it is fed again, with the same numbers and learning rates;
results that were taken before are dropped.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, TypeVar

from rpcpipe.driver.callbacks import tell
from rpcpipe.driver.feeding import cut_pair
from rpcpipe.driver.inference import NOTHING, Wanted
from rpcpipe.driver.optimizer import check_alike
from rpcpipe.driver.program import Fed
from rpcpipe.driver.replies import raise_loss
from rpcpipe.driver.result import StreamedBatch, StreamResult, last_update
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.stream_state import FedBatch, StreamState
from rpcpipe.driver.succession import healed
from rpcpipe.driver.tracing import spans
from rpcpipe.errors import Failure, NonFiniteError, RpcPipeError, ScheduleError, StageError, WorkerLost
from rpcpipe.model.microbatch import Nest, copied
from rpcpipe.schedules import Action, Timeline
from rpcpipe.schedules.action import NAMES
from rpcpipe.schedules.asynchronous import StreamOrder
from rpcpipe.schedules.weight_versions import Policy
from rpcpipe.stage.context import StepContext
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.messages import Report
from rpcpipe.worker.operations import BeginStep, EndStream, ResumeStream, Task

T = TypeVar("T")

log = logging.getLogger("rpcpipe")


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
                while self.results or (self._is_open and self._open.under_way > self._ahead):
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
        cut, target_parts = cut_pair(runtime, copied(inputs), copied(targets))
        with shield_interrupts():
            self._healed(self._ensure_open)
            runtime.enter(self)
            try:
                runtime.optimizer.step()  # calls apply; learning-rate schedulers count the calls
            finally:
                runtime.leave(self)
            parts, policy = list(zip(cut.parts, target_parts, strict=True)), self._policy
            clip = runtime.settings.clip_grad_norm
            self._open.add(policy.updates(len(parts)), parts, cut, runtime.optimizer.lr, clip)
            self._healed(self._issue_batches)
        if policy.must_drain(len(parts), len(runtime.names)):
            self.flush()

    def apply(self) -> None:
        """Take the optimizer's hyperparameters for the batch being fed; called by ``pipe.optimizer.step()``."""
        self._open.hyperparameters = self._runtime.optimizer.changes()

    def forget(self) -> None:
        """Do nothing: a stream accumulates no gradients over calls."""

    def lose(self) -> None:
        """Note that workers are being replaced: what is under way must be fed again."""
        if self._is_open:
            self._open.lost = True

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

    @property
    def _policy(self) -> Policy:
        policy = self._open.plan.policy
        assert policy is not None
        return policy

    def _ensure_open(self) -> None:
        """Start the stream on all workers. Raises ScheduleError if the pipeline's schedule is synchronous now."""
        if self._is_open:
            return
        runtime = self._runtime
        runtime.check()
        if runtime.policy is None:
            raise ScheduleError(
                f"the schedule has become {runtime.schedule.name!r}, which does not stream; leave the loop over"
                " pipe.train first and begin another"
            )
        runtime.check_policy(runtime.policy)
        step = runtime.driver.new_step()
        plan = StepContext(
            step, runtime.trained, True, (), trace=runtime.tracer is not None, policy=runtime.policy,
            stop=runtime.settings.nonfinite == "stop", measures=self._wanted.measures,
            keep_outputs=self._wanted.outputs,
        )  # fmt: skip
        self._state = StreamState(
            stream=step,
            plan=plan,
            first=runtime.driver.places(),
            order=StreamOrder(len(runtime.names)),
            logs=runtime.cluster.heal > 0,
        )
        runtime.stream = self
        self._start(BeginStep(plan))

    def _start(self, operation: BeginStep | ResumeStream) -> None:
        runtime, step = self._runtime, self._open.plan.step
        for name in runtime.names:
            runtime.driver.send(name, step, Task(operation))
        self._open.watches = runtime.driver.watch(step)

    def _issue_batches(self) -> None:
        """Issue the actions that the batches make possible that have not been issued."""
        state = self._open
        for batch in state.batches:
            if not batch.issued:
                # A successor has read nothing; where nobody has died this was asked before.
                self._runtime.readers.ensure(self._runtime.deployment, batch.parts[0].part)
                batch.issued = True
                for fed, last in batch.to_feed():
                    self._issue(state.order.feed(last=last), fed, batch.held)

    def _issue(self, actions: list[tuple[int, Action]], fed: Fed | None, held: list[object]) -> None:
        """Send ``actions``, with ``fed`` as the forwards' micro-batch, and add the RRefs to keep to ``held``."""
        runtime, state = self._runtime, self._open
        calls = runtime.program.stream(actions, state.groups, fed, state.update)
        handles, replies = runtime.driver.feed(state.plan.step, calls)
        held += handles
        state.replies |= replies

    def _drain(self) -> None:
        """Issue all actions that finish the batches fed so far."""
        if self._is_open and not self._open.drained:
            self._open.drained = True
            self._issue(self._open.order.drain(), None, self._open.batches[-1].held if self._open.batches else [])

    # --- going on where workers have died ---

    def _healed(self, call: Callable[[], T]) -> T:
        """Return ``call()``, made again once the stream goes on with the successors of workers that have died in it."""
        runtime = self._runtime

        def go_on() -> T:
            if self._is_open and self._open.lost:
                self._resume()
            return call()

        def mend() -> None:
            runtime.mend()
            self.lose()

        try:
            return healed(runtime.cluster, mend, go_on, after="A note below says which minibatches are in the weights")
        except Exception as error:  # of what was to be sent some workers know, and some do not
            if self._is_open:
                self._abort(error)
            raise

    def _resume(self) -> None:
        """Let all workers restore their newest common snapshot, and feed again all batches since then."""
        runtime, state = self._runtime, self._open
        runtime.driver.cancel(state.plan.step, state.first)
        state.restart(runtime.driver.new_step(), runtime.driver.places(), len(runtime.names))
        self._start(ResumeStream(state.plan, state.stream, state.newest))
        self._issue_batches()
        if state.drained:
            state.drained = False
            self._drain()

    # --- collecting ---

    def flush(self) -> None:
        """Drain the pipeline. Afterwards all stages have the same updates and one version of the weights."""
        if not self._is_open:
            return
        with shield_interrupts():
            self._healed(self._finish)

    def _finish(self) -> None:
        self._drain()
        while self._open.batches:
            if (result := self._next()) is not None:
                self.results.append(result)
        self._close(None)

    def _collect(self) -> StreamResult:
        """Wait for the oldest batch whose result was not taken, and return its result."""

        def collect() -> StreamResult:
            while (result := self._next()) is None:
                pass
            return result

        return self._healed(collect)

    def _next(self) -> StreamResult | None:
        """Wait for the oldest batch and return its result, None if it was taken before; end the stream on an error."""
        runtime, batch = self._runtime, self._open.batches[0]
        with shield_interrupts():
            try:
                reports = runtime.driver.collect(self._open.replies_of(batch, runtime.names), self._open.watches)
                for group in batch.awaited:
                    check_alike({name: reports[name, group].updated.changed for name in runtime.names})
            except StageError as error:
                raise self._stop(error) from None
            except (KeyboardInterrupt, WorkerLost):
                raise
            except BaseException as error:
                self._abort(error)
                raise
            given = batch.given
            self._open.finish(batch, runtime.names)
            runtime.trained = self._open.base + self._open.committed
            return None if given else self._result(batch, reports)

    def _result(self, batch: FedBatch, reports: Mapping[tuple[str, int], Report]) -> StreamResult:
        """Return the result of ``batch``; ``reports``: by worker and group."""
        runtime, number = self._runtime, self._open.base + batch.groups.start
        since, self._open.since = self._open.since, time.perf_counter()
        by_worker = {name: Report.joined([reports[name, group] for group in batch.groups]) for name in runtime.names}
        streamed = StreamedBatch(self._open.base, batch.groups, batch.shares, batch.lr, batch.size)
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
        """End the stream on all workers. ``updates``: first restore the state after this number of updates.

        Until all have ended it, it may have to go on.
        """
        runtime, state = self._runtime, self._open
        try:
            runtime.driver.cancel(state.plan.step, runtime.driver.places())
            end = EndStream(state.stream, updates)
            runtime.driver.collect({name: runtime.driver.call(name, end) for name in runtime.names})
        except (KeyboardInterrupt, WorkerLost):
            raise  # the next call ends it
        except BaseException:
            self._leave()
            raise
        self._leave()

    def _leave(self) -> None:
        self._open.is_open, self._runtime.stream = False, None

    def _stop(self, error: StageError) -> RpcPipeError:
        """Finish the groups before the failed one on all stages and end the stream; return the error to raise.

        If the stages have done different numbers of groups by then, all return to their newest common snapshot.
        """
        runtime, driver, state = self._runtime, self._runtime.driver, self._open
        group = state.batches[0].awaited.start if error.chunk is None else state.groups[error.chunk]
        try:
            with shield_interrupts():
                driver.abandon(state.plan.step, group)
                self._drain()
                outcomes = driver.outcomes(state.replies)
                raise_loss(outcomes.values())
                done = {self._leading(name, outcomes) for name in runtime.names}
                common = done.pop() if len(done) == 1 and not any(map(_is_halfway, outcomes.values())) else None
                updates = state.newest if common is None else common
                self._close(updates if common is None else None)
        except WorkerLost:
            raise
        except BaseException as second_error:
            self._abort(second_error)
            raise
        return StageError.of(dataclasses.replace(error.failure, after=self._account(updates)))

    def _leading(self, name: str, outcomes: Mapping[tuple[str, int], Any]) -> int:
        """Return the number of groups, counted without a gap, that the worker has done."""
        group = self._open.batches[0].awaited.start
        while not isinstance(outcomes.get((name, group), Failure.cancel(name, "")), Failure):
            group += 1
        return group

    def _abort(self, error: BaseException) -> None:
        """End the stream after an error that leaves the workers' progress unknown.

        All stages restore the newest snapshot that all of them hold; nothing is sent if a worker is lost for good.
        """
        runtime, state = self._runtime, self._open
        self._leave()
        if not runtime.cluster.heal and (isinstance(error, WorkerLost) or not runtime.cluster.healthy):
            return
        with shield_interrupts():
            runtime.driver.cancel(state.plan.step, state.first)
            runtime.driver.ensure([EndStream(state.stream, state.newest)])
            error.add_note(self._account(state.newest))

    def _account(self, updates: int) -> str:
        """Set ``trained`` and return a text for users on which minibatches are in the weights."""
        runtime = self._runtime
        runtime.trained = self._open.base + updates
        fed, unit = self._open.base + len(self._open.changes), self._policy.unit
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
