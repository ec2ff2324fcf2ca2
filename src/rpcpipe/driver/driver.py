"""The driver's half of a pipeline: issue the step, collect the reports, gate, apply.

Nothing here waits for data: all of a step's calls are issued ahead, and the workers put them in
order by their sequence numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rpcpipe.driver.optimizer import check_alike
from rpcpipe.driver.recovery import Begin, Event, Fail, Idle, OtherCall, State, Succeed, TakeBack, transition
from rpcpipe.errors import DeadlineExceeded, Failure, StageError
from rpcpipe.stage import gradients
from rpcpipe.stage.context import StepContext
from rpcpipe.transport.base import Transport
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.messages import Port, Report, Updated
from rpcpipe.worker.operations import (
    BeginStep,
    Call,
    NormalizeGradients,
    Operation,
    PublishGradients,
    ReportStep,
    RollBackStep,
    RunAction,
    Task,
    UpdateWeights,
)

# How often a silent wait asks the workers whether anything still moves, in seconds.
_POLL = 1.0
_CLOCK_CALLS = 8

K = TypeVar("K")


@dataclass(frozen=True)
class GradientGate:
    """What all stages together say of a step before any weight changes; ``factor`` clips its gradients."""

    grad_norm: float
    factor: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm)

    @classmethod
    def of(cls, reports: Mapping[str, Report], max_norm: float | None) -> GradientGate:
        """The norm of all gradients and what clipping to ``max_norm`` makes of it.

        The factor is ``torch.nn.utils.clip_grad_norm_``'s.
        """
        by_stage: dict[int, dict[int, float]] = {}
        for report in reports.values():
            for stage, norms in report.norms.items():
                by_stage.setdefault(stage, {}).update(norms)  # replicas report different ones
        found = [norm for _, norms in sorted(by_stage.items()) for _, norm in sorted(norms.items())]
        dtype = gradients.joint_dtype(report.norm_dtype for report in reports.values() if any(report.norms.values()))
        norm = gradients.total_norm(found, dtype)
        return cls(norm, 1.0 if max_norm is None else gradients.clip_factor(norm, max_norm, dtype))


class Driver:
    """One pipeline's calls to its workers, each worker's in one strict sequence."""

    def __init__(
        self, transport: Transport, pipeline: str, workers: Sequence[str], *, timeout: float, batched: bool
    ) -> None:
        self.workers = list(workers)
        self._step = 0
        self._transport = transport
        self._pipeline = pipeline
        self._timeout = timeout
        self._batched = batched
        self._next = dict.fromkeys(self.workers, 0)
        self._held: list[object] = []
        # Recorded before anything is sent: whatever ends a step, the next call begins by rolling it back.
        self._recovery: State = Idle()

    def new_step(self) -> int:
        """A number that no message has carried yet."""
        self._step += 1
        return self._step - 1

    # --- a step, in the order of DESIGN: issue, collect, gate, apply ---

    def run(self, calls: Sequence[Call], plan: StepContext, values: Mapping[Port, Any]) -> dict[str, Report]:
        """Execute one step's actions; every worker's report, or one error and a cancelled step."""
        with self._cancelling(plan.step):
            return self.collect(self.issue(calls, plan, values))

    def issue(self, calls: Sequence[Call], plan: StepContext, values: Mapping[Port, Any]) -> dict[str, Future[Any]]:
        """Send one step's actions; each worker's reply. Several steps without updates may be under way at once."""
        return self._issue_batched(calls, plan, values) if self._batched else self._issue(calls, plan, values)

    def normalize_gradients(self, step: int, count: float, reports: Mapping[str, Report]) -> None:
        """Divide the gradients of a loss that gave sums; ``reports`` get the norms of what comes out.

        Nothing counted, nothing learnt: 0/0 is for the gate to refuse, not for the weights.
        """
        with self._cancelling(step):
            task = Task(NormalizeGradients(count or math.nan))
            for worker, norms in self.collect(self._post_all(step, task)).items():
                reports[worker].norms = norms

    def publish_gradients(self, step: int, context_id: int, gate: GradientGate) -> dict[str, Future[Any]]:
        """File every stage's gradients in the step's distributed-autograd context."""
        task = Task(PublishGradients(context_id, gate.factor))
        with self._cancelling(step):
            return self._post_all(step, task)

    def settle(self, step: int, replies: Mapping[str, Future[Any]]) -> None:
        """Wait for what ``publish_gradients`` has begun."""
        with self._cancelling(step):
            self.collect(replies)

    def update_weights(
        self, step: int, context_id: int, changes: Sequence[Mapping[str, Any]], after: Mapping[str, list[Task]]
    ) -> dict[str, tuple[int, int]]:
        """Apply the context's gradients on all workers, or on none; when each worker did it.

        ``after``: what a worker has to do then, the last of which says when as well. Raises ArgumentError if the
        workers' optimizers have changed their hyperparameters in different ways.
        """
        task = Task(UpdateWeights(context_id, changes))
        with self._cancelling(step, updating=True):
            done: dict[str, Updated] = self.collect(
                {worker: self._post(worker, step, [task, *after.get(worker, ())]) for worker in self.workers}
            )
            check_alike({worker: updated.changed for worker, updated in done.items()})
        return {worker: (updated.start, updated.end) for worker, updated in done.items()}

    def roll_back(self, step: int, *, updating: bool) -> None:
        """Undo what ``step`` did, if it began last, before anything else runs; ``updating``: its update too."""
        self._note(TakeBack(step, updating))

    def clock_offset(self, worker: str) -> int:
        """Nanoseconds by which ``worker``'s clock is ahead of this process's.

        From the quickest of a few calls, in whose middle the worker's clock was read (Cristian,
        1989); wrong by at most half of that call's time.
        """
        found = []
        for _ in range(_CLOCK_CALLS):
            sent = time.monotonic_ns()
            there: int = self.collect({worker: self._transport.call(worker, "clock")})[worker]
            back = time.monotonic_ns()
            found.append((back - sent, there - (sent + back) // 2))
        return min(found)[1]

    # --- a stream ---

    def feed(
        self, step: int, calls: Iterable[tuple[str, Task, list[tuple[Port, Any]]]]
    ) -> tuple[list[object], dict[tuple[str, int], Future[Any]]]:
        """Issue (worker, task, values for it): RRefs to keep, and each update's reply by worker and group."""
        held: list[object] = []
        replies: dict[tuple[str, int], Future[Any]] = {}
        waiting: dict[str, tuple[list[Task], list[tuple[Port, Any]]]] = {}
        for worker, task, values in calls:
            tasks, given = waiting.setdefault(worker, ([], []))
            tasks.append(task)
            given += values
            if isinstance(task.operation, RunAction) and task.operation.route.action.kind == "U":
                replies[worker, task.group] = self._post(worker, step, *waiting.pop(worker))
            elif not self._batched:
                with shield_interrupts():
                    call = self._call(worker, step, *waiting.pop(worker))
                    held.append(self._transport.remote(worker, "accept", *call))
        for worker, (tasks, given) in waiting.items():
            self._post(worker, step, tasks, given)
        return held, replies

    def send(self, worker: str, step: int, task: Task) -> Future[Any]:
        """One task in its place of ``step``."""
        return self._post(worker, step, [task])

    def watch(self, step: int) -> list[Future[Any]]:
        """Each worker's first failure in ``step``, as soon as it is known there."""
        return [self._transport.call(worker, "watch", self._pipeline, step) for worker in self.workers]

    def places(self) -> dict[str, int]:
        """Each worker's next place, after what rolls back an unsettled step."""
        self._note(OtherCall(-1))
        return dict(self._next)

    def abandon(self, step: int, group: int) -> None:
        """Do no more of the stream from ``group`` on."""
        for worker in self.workers:
            self._transport.send(worker, "abandon", self._pipeline, step, group)

    def cancel(self, step: int, first: Mapping[str, int]) -> None:
        """Drop ``step``, whose tasks have the places from ``first`` on; values that still come are discarded."""
        for worker in self.workers:
            self._transport.send(worker, "cancel", self._pipeline, step, first[worker], self._next[worker])

    # --- calls ---

    def control(self, worker: str, operation: Operation) -> Any:
        """One operation of ``worker``'s actor, between steps."""
        return self.collect({worker: self.call(worker, operation)})[worker]

    def call(self, worker: str, operation: Operation) -> Future[Any]:
        """Like ``control``, without waiting."""
        return self._post(worker, -1, [Task(operation)])

    def remote(self, worker: str, operation: Operation) -> Any:
        """Like ``call``; the result stays on the worker and an RRef comes back."""
        with shield_interrupts():
            return self._transport.remote(worker, "submit", *self._call(worker, -1, [Task(operation)]), later=True)

    def remote_chained(self, worker: str, number: int, inputs: Any) -> Any:
        """An RRef to stage ``number``'s output for ``inputs``, which may hold RRefs."""
        return self._transport.remote_chained(worker, "forward", self._pipeline, number, inputs)

    def _note(self, event: Event) -> None:
        """Take note of ``event``; what it makes of the step under way is rolled back on all workers.

        Nothing is waited for: what comes next comes after it in every worker's sequence, and what workers still send
        for the step is discarded by its number.
        """
        with shield_interrupts():
            self._recovery, undone = transition(self._recovery, event)
            if undone is None:
                return
            self._held.clear()
            self.cancel(undone.step, undone.first)
            for worker in self.workers:
                self._post(worker, -1, [Task(RollBackStep(undone.step, undone.updating))])

    def drop(self) -> list[Future[Any]]:
        """Free the stages."""
        self._held.clear()
        return [self._transport.call(worker, "drop", self._pipeline) for worker in self.workers]

    def _issue(self, calls: Iterable[Call], plan: StepContext, values: Mapping[Port, Any]) -> dict[str, Future[Any]]:
        """One asynchronous call per action, whose RRef is kept until the step is over."""
        self._held = []
        begin = {worker: [Task(BeginStep(plan))] for worker in self.workers}
        for worker, tasks in calls:
            tasks = begin.pop(worker, []) + tasks
            with shield_interrupts():
                call = self._call(worker, plan.step, tasks, _given(tasks, values))
                self._held.append(self._transport.remote(worker, "accept", *call))
        return {
            worker: self._post(worker, plan.step, [*begin.get(worker, []), Task(ReportStep())])
            for worker in self.workers
        }

    def _issue_batched(
        self, calls: Iterable[Call], plan: StepContext, values: Mapping[Port, Any]
    ) -> dict[str, Future[Any]]:
        """The same tasks in one message per worker."""
        tasks = {worker: [Task(BeginStep(plan))] for worker in self.workers}
        for worker, more in calls:
            tasks[worker] += more
        return {
            worker: self._post(worker, plan.step, [*mine, Task(ReportStep())], _given(mine, values))
            for worker, mine in tasks.items()
        }

    def _post_all(self, step: int, task: Task) -> dict[str, Future[Any]]:
        return {worker: self._post(worker, step, [task]) for worker in self.workers}

    def _post(self, worker: str, step: int, tasks: list[Task], values: Sequence[tuple[Port, Any]] = ()) -> Future[Any]:
        with shield_interrupts():  # a number taken and not sent would stop the worker's sequence
            return self._transport.call(worker, "submit", *self._call(worker, step, tasks, values))

    def _call(
        self, worker: str, step: int, tasks: list[Task], values: Sequence[tuple[Port, Any]] = ()
    ) -> tuple[str, int, int, list[Task], Sequence[tuple[Port, Any]]]:
        """The arguments of ``submit`` and ``accept``; takes the tasks' places in the sequence."""
        self._note(OtherCall(step))
        sequence = self._next[worker]
        self._next[worker] += len(tasks)
        return self._pipeline, step, sequence, tasks, values

    # --- waiting ---

    @contextmanager
    def _cancelling(self, step: int, *, updating: bool = False) -> Iterator[None]:
        self._note(OtherCall(step))
        self._note(Begin(step, dict(self._next), updating))
        try:
            yield
        except BaseException:
            self._note(Fail())
            raise
        self._note(Succeed())

    def collect(self, replies: Mapping[K, Future[Any]], watches: Collection[Future[Any]] = ()) -> dict[K, Any]:
        """All replies by key; the first failure is raised, and so is a standstill.

        ``watches`` need not come, but if one does with a failure that is raised.
        """
        for outcome in self._arriving(replies, watches):
            if isinstance(outcome, Failure):
                raise StageError.of(outcome)
        return {key: reply.result() for key, reply in replies.items()}

    def outcomes(self, replies: Mapping[K, Future[Any]]) -> dict[K, Any]:
        """All replies by key, failures among them; a standstill is raised."""
        for _ in self._arriving(replies):
            pass
        return {key: reply.result() for key, reply in replies.items()}

    def _arriving(self, replies: Mapping[K, Future[Any]], watches: Collection[Future[Any]] = ()) -> Iterator[Any]:
        wanted = set(replies.values())
        pending = wanted | set(watches)
        patience = _Patience(self._transport, self.workers, self._timeout)
        while pending & wanted:
            done, pending = self._transport.wait(pending, min(_POLL, self._timeout / 4))
            yield from (reply.result() for reply in done)
            if not done:
                patience.check()


def _given(tasks: Sequence[Task], values: Mapping[Port, Any]) -> list[tuple[Port, Any]]:
    """The driver's own values for ``tasks``."""
    return [(port, values[port]) for task in tasks for port in task.awaits if port in values]


class _Patience:
    """Ends a wait in which no worker has finished anything for ``timeout`` seconds."""

    def __init__(self, transport: Transport, workers: Sequence[str], timeout: float) -> None:
        self._transport = transport
        self._workers = workers
        self._timeout = timeout
        self._last: dict[str, int] = {}
        self._moved = time.monotonic()

    def check(self) -> None:
        asked = {worker: self._transport.call(worker, "progress") for worker in self._workers}
        pending, until = set(asked.values()), time.monotonic() + min(_POLL, self._timeout / 4)
        while pending and (left := until - time.monotonic()) > 0:
            done, pending = self._transport.wait(pending, left)
            if not done:
                break
        states = {worker: reply.result() for worker, reply in asked.items() if reply.done()}
        finished = {worker: state[0] for worker, state in states.items()}
        moved = any(self._last.get(worker, count) != count for worker, count in finished.items())
        self._last.update(finished)
        if moved:
            self._moved = time.monotonic()
        elif time.monotonic() - self._moved > self._timeout:
            now = "; ".join(
                f"{worker} {states[worker][1] if worker in states else 'does not answer'}" for worker in self._workers
            )
            raise DeadlineExceeded(
                f"no worker has finished anything for {self._timeout:g} s: {now}."
                " If an action may take that long, pass a larger timeout to rp.launch or rp.connect"
            )
