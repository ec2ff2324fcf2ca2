"""The driver's side of a pipeline: issue a step, collect the reports, and roll back what fails.

The driver waits for no data between stages: it issues all of a step's calls ahead, and the workers restore
their order by sequence numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from rpcpipe.driver.ending import REPORT, Ending
from rpcpipe.driver.optimizer import check_alike
from rpcpipe.driver.patience import POLL, Patience
from rpcpipe.driver.program import Program
from rpcpipe.driver.recovery import (
    Begin,
    BeginAhead,
    Event,
    Fail,
    Follow,
    Idle,
    OtherCall,
    RollBack,
    State,
    Succeed,
    TakeBack,
    transition,
)
from rpcpipe.driver.replies import is_done, outcome_of
from rpcpipe.driver.sender import Issue, Sender
from rpcpipe.driver.sharing import Sharing
from rpcpipe.errors import Failure, StageError
from rpcpipe.stage.context import StepContext
from rpcpipe.transport.base import Transport
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.agreement import divisor
from rpcpipe.worker.messages import ORDERS, Orders, Port, Report, Updated
from rpcpipe.worker.operations import (
    GetReach,
    LastUpdate,
    NormalizeGradients,
    Operation,
    PublishGradients,
    RollBackStep,
    RunAction,
    Task,
    UndoUpdate,
    UpdateWeights,
)

K = TypeVar("K")


class Driver:
    """Sends one pipeline's calls to its workers; the calls to each worker form one strict sequence."""

    def __init__(
        self, transport: Transport, pipeline: str, workers: Sequence[str], *, timeout: float, batched: bool
    ) -> None:
        self.workers = list(workers)
        self._step = 0
        self._transport = transport
        self._pipeline = pipeline
        self._timeout = timeout
        self._batched = batched
        self._sender = Sender(transport, pipeline, self.workers, before=lambda step: self._note(OtherCall(step)))
        # The state is recorded before a message is sent, so the next call can roll back a step however it ended.
        self._recovery: State = Idle()
        # By worker, what ``ensure`` has sent it and it may not have executed: its successor must.
        self._ensured: dict[str, list[tuple[list[Task], Future[Any]]]] = {}
        self.sharing = Sharing()
        # By worker that has taken a dead one's place, the place in its sequence after what it was told to do first.
        self._welcomed: dict[str, int] = {}

    def new_step(self) -> int:
        """Return a step number that no message has carried yet."""
        self._step += 1
        return self._step - 1

    # --- a step, in the order of docs/design/step.md ---

    def run(
        self,
        program: Program,
        plan: StepContext,
        values: Mapping[Port, Any],
        ending: Ending,
        meanwhile: Callable[[], None],
    ) -> dict[str, Report]:
        """Execute one step's actions; return every worker's report. After an error the step is rolled back.

        ``meanwhile`` runs once all calls have been issued. Raises ModelError for optimizers that have parted.
        """
        with self._cancelling(plan.step, updating=ending.updates):
            replies = self._issue(program, plan, values, ending, keep=True)
            meanwhile()
            return self._reports(program, replies)

    def run_ahead(
        self, program: Program, plan: StepContext, values: Mapping[Port, Any], ending: Ending
    ) -> dict[str, Future[Any]]:
        """Issue the actions of the step after the one under way, for ``follow``; any other call takes it back."""
        self._note(BeginAhead(plan.step, dict(self._sender.next)))
        return self._issue(program, plan, values, ending, keep=True)

    @property
    def ahead(self) -> int | None:
        """Return the number of the step that runs ahead, if one does."""
        state = self._recovery
        return None if isinstance(state, Idle) or state.ahead is None else state.ahead.step

    def follow(
        self, program: Program, replies: Mapping[str, Future[Any]], orders: Orders | None, meanwhile: Callable[[], None]
    ) -> dict[str, Report]:
        """Let the step ahead go on, now that the one before is settled; return and raise what ``run`` does.

        ``orders``: what its update needs, if workers update by themselves.
        """
        step = self.ahead
        assert step is not None
        self._note(Follow(updating=orders is not None))
        with self._settling():
            for worker in self.workers if orders is not None else ():
                self._transport.send(worker, "supply", self._pipeline, step, [(ORDERS, orders)])
            meanwhile()
            return self._reports(program, replies)

    def _reports(self, program: Program, replies: Mapping[str, Future[Any]]) -> dict[str, Report]:
        try:
            reports: dict[str, Report] = self.collect(replies)
        except BaseException:
            self._sender.forget(program)
            raise
        self._sender.confirm(program)
        check_alike({worker: report.updated.changed for worker, report in reports.items()})
        return reports

    def issue(self, program: Program, plan: StepContext, values: Mapping[Port, Any]) -> dict[str, Future[Any]]:
        """Send one forward pass's actions; return each worker's reply. Several may be under way."""
        return self._issue(program, plan, values, REPORT, keep=False)

    def _issue(
        self, program: Program, plan: StepContext, values: Mapping[Port, Any], ending: Ending, *, keep: bool
    ) -> dict[str, Future[Any]]:
        state = self._recovery
        self._sender.release((plan.step if isinstance(state, Idle) or state.ahead is None else state.step) - 1)
        ends = {worker: ending.tasks(worker) for worker in self.workers}
        issue = self._sender.issue_batched if self._batched else self._sender.issue
        return issue(Issue(program, plan, values, ends, keep))

    def take_update_back(self, step: int) -> None:
        """Undo the updates of ``step``, which has succeeded; what its forwards have changed stays."""
        self.take_ahead_back()
        self._post_all(step, Task(UndoUpdate(step)))
        self.sharing.begin(self)

    def take_ahead_back(self) -> None:
        """Roll back the step ahead, if there is one; the one before must be settled."""
        self._note(OtherCall(-1))

    def normalize_gradients(self, step: int, count: float, reports: Mapping[str, Report]) -> None:
        """Divide gradients of a loss of (sum, count) by ``count``, by NaN for 0; put the new norms into ``reports``."""
        with self._cancelling(step):
            task = Task(NormalizeGradients(divisor(count)))
            for worker, norms in self.collect(self._post_all(step, task)).items():
                reports[worker].norms = norms

    def publish_gradients(self, step: int, context_id: int, factor: float) -> dict[str, Future[Any]]:
        """Begin to add every stage's gradients, times ``factor``, to the step's context; return the replies."""
        task = Task(PublishGradients(context_id, factor))
        with self._cancelling(step):
            return self._post_all(step, task)

    def settle(self, step: int, replies: Mapping[str, Future[Any]]) -> None:
        """Wait for the ``replies`` of ``publish_gradients``."""
        with self._cancelling(step):
            self.collect(replies)

    def update_weights(
        self,
        step: int,
        context_id: int,
        changes: Sequence[Mapping[str, Any]],
        after: Mapping[str, list[Task]],
        *,
        undoes: bool,
    ) -> dict[str, tuple[int, int]]:
        """Apply the context's gradients on all workers; return each worker's (start, end) in ns.

        ``after``: tasks to run on each worker after its update. ``undoes``: an update that fails is taken back, from
        the workers' copies; else nothing is sent then, see ``reaches``. Raises ModelError for optimizers that have
        changed their hyperparameters in different ways.
        """
        tasks = {
            worker: [Task(UpdateWeights(context_id, changes)), *after.get(worker, ()), Task(LastUpdate())]
            for worker in self.workers
        }
        with self._cancelling(step, updating=True) if undoes else nullcontext():
            replies = {worker: self._sender.post(worker, step, own) for worker, own in tasks.items()}
            done: dict[str, Updated] = self.collect(replies)
            check_alike({worker: updated.changed for worker, updated in done.items()}, undone=undoes)
        return {worker: (updated.start, updated.end) for worker, updated in done.items()}

    def reaches(self, step: int) -> dict[str, Any]:
        """Drop what has not begun of the update of ``step``; return how far each worker is, its loss or Failure."""
        if not isinstance(self._recovery, Idle) and self._recovery.step == step:
            self.cancel(step, self._recovery.first)
        return self.outcomes({worker: self.call(worker, GetReach(step)) for worker in self.workers})

    def roll_back(self, step: int, *, updating: bool) -> None:
        """Roll ``step`` back before any later call, if it began last; ``updating``: roll back its update, too."""
        self._note(TakeBack(step, updating))

    # --- a stream ---

    def feed(
        self, step: int, calls: Iterable[tuple[str, Task, list[tuple[Port, Any]]]]
    ) -> tuple[list[object], dict[tuple[str, int], Future[Any]]]:
        """Issue every (worker, task, values for it) of a stream.

        Returns (RRefs to keep until the batch is done, each update's reply by worker and group).
        """
        held, replies = list[object](), dict[tuple[str, int], Future[Any]]()
        waiting: dict[str, tuple[list[Task], list[tuple[Port, Any]]]] = {}
        for worker, task, values in calls:
            tasks, task_values = waiting.setdefault(worker, ([], []))
            tasks.append(task)
            task_values += values
            if isinstance(task.operation, RunAction) and task.operation.route.action.kind == "U":
                replies[worker, task.group] = self._sender.post(worker, step, *waiting.pop(worker))
            elif not self._batched:
                held.append(self._sender.hold(worker, step, *waiting.pop(worker)))
        for worker, (tasks, task_values) in waiting.items():
            self._sender.post(worker, step, tasks, task_values)
        return held, replies

    def send(self, worker: str, step: int, task: Task) -> Future[Any]:
        """Send one task of ``step``; return its reply."""
        return self._sender.post(worker, step, [task])

    def watch(self, step: int) -> list[Future[Any]]:
        """Return, for each worker, a future of its first failure in ``step``."""
        return [self._transport.call(worker, "watch", self._pipeline, step) for worker in self.workers]

    def places(self) -> dict[str, int]:
        """Roll back an unsettled step; then return the next place in each worker's sequence."""
        self._note(OtherCall(-1))
        return dict(self._sender.next)

    def abandon(self, step: int, group: int) -> None:
        """Cancel the stream's tasks from ``group`` on, on all workers."""
        for worker in self.workers:
            self._transport.send(worker, "abandon", self._pipeline, step, group)

    def cancel(self, step: int, first: Mapping[str, int]) -> None:
        """Drop ``step``, whose tasks have the places from ``first`` on, and the values that still arrive for it."""
        for worker in self.workers:
            place = max(first[worker], self._welcomed.get(worker, 0))  # what its successor was told to do stays
            self._transport.send(worker, "cancel", self._pipeline, step, place, self._sender.next[worker])

    def ensure(self, operations: Iterable[Operation], workers: Iterable[str] | None = None) -> None:
        """Have ``workers``, None for all, execute ``operations`` before later calls, or who succeeds one that dies."""
        tasks = list(map(Task, operations))
        for worker in self.workers if workers is None else workers:
            left = [(own, reply) for own, reply in self._ensured.get(worker, []) if not is_done(reply)]
            self._ensured[worker] = [*left, (tasks, self._sender.post(worker, -1, tasks))]

    # --- calls ---

    def control(self, worker: str, operation: Operation) -> Any:
        """Execute one operation of ``worker``'s actor between steps; return its result."""
        return self.collect({worker: self.call(worker, operation)})[worker]

    def call(self, worker: str, operation: Operation, before: Operation | None = None) -> Future[Any]:
        """Execute one operation like ``control``, after the one ``before``; return the future of its result."""
        return self._sender.post(worker, -1, [Task(one) for one in (before, operation) if one is not None])

    def remote(self, worker: str, operation: Operation) -> Any:
        """Execute one operation like ``control``; keep its result on the worker and return an RRef to it."""
        return self._sender.remote(worker, Task(operation))

    def remote_chained(self, worker: str, number: int, inputs: Any) -> Any:
        """Return an RRef to stage ``number``'s output for ``inputs``, which may hold RRefs."""
        self._note(OtherCall(-1))
        return self._transport.remote_chained(worker, "forward", self._pipeline, number, inputs)

    def _note(self, event: Event) -> None:
        """Record ``event``; if a step under way must be rolled back, send the rollback to all workers.

        It is not awaited: later calls follow it in every worker's sequence; values still sent for the step are dropped.
        """
        with shield_interrupts():
            self._recovery, undone = transition(self._recovery, event)
            if undone is not None:
                self._send(undone)

    def _send(self, undone: RollBack) -> None:
        """Have all workers drop the tasks of the steps that are ``undone``, and roll these back, the last first."""
        orders = [] if undone.ahead is None else [RollBackStep(undone.ahead, updating=False, ahead=True)]
        orders += [] if undone.step is None else [RollBackStep(undone.step, undone.updating)]
        newest = orders[0].step
        self._sender.release(newest)
        self.cancel(newest, undone.first)
        self.ensure(orders)
        if undone.updating:
            self.sharing.begin(self)

    def revive(self, worker: str, path: str, *, copy: bool = False) -> Future[Any]:
        """Have a successor go on from what ``worker`` kept at ``path``, or a copy; return the reply."""
        return self.ask(worker, "revive", self.new_step(), path, self._sender.next[worker], copy)

    def ask(self, worker: str, verb: str, *args: Any) -> Future[Any]:
        """Call a verb of ``worker`` for this pipeline, outside of its sequence; return the reply."""
        return self._transport.call(worker, verb, self._pipeline, *args)

    def restart(self) -> None:
        """Go on with workers all of whom have been revived from a snapshot: nothing is left to be done or undone."""
        self._ensured.clear()
        self.sharing.end()
        for worker in self.workers:
            self.welcome(worker)

    def welcome(self, worker: str) -> None:
        """Let ``worker``, which has been revived, follow on to the others: nothing of the driver's is under way."""
        self._recovery = Idle()
        self._sender.forget_all()
        place = self._sender.next[worker]
        self._transport.send(worker, "cancel", self._pipeline, self._step - 1, place, place)
        self.ensure_again(worker)
        self._welcomed[worker] = self._sender.next[worker]

    def ensure_again(self, worker: str) -> None:
        """Have ``worker`` execute what ``ensure`` has sent it and it is not known to have executed."""
        for tasks, reply in self._ensured.pop(worker, []):
            if not is_done(reply):
                self.ensure([task.operation for task in tasks], [worker])

    def drop(self) -> list[Future[Any]]:
        """Free the stages on all workers; return their replies."""
        self._sender.release(self._step)
        return [self._transport.call(worker, "drop", self._pipeline) for worker in self.workers]

    def _post_all(self, step: int, task: Task) -> dict[str, Future[Any]]:
        return {worker: self._sender.post(worker, step, [task]) for worker in self.workers}

    # --- waiting ---

    @contextmanager
    def _cancelling(self, step: int, *, updating: bool = False) -> Iterator[None]:
        """Record the begin and the outcome of the block's calls of ``step``; an exception rolls the step back."""
        self._note(OtherCall(step))
        self._note(Begin(step, dict(self._sender.next), updating))
        with self._settling():
            yield

    @contextmanager
    def _settling(self) -> Iterator[None]:
        """Record the outcome of the block, which waits for calls of the step under way; an exception rolls it back."""
        try:
            yield
        except BaseException:
            self._note(Fail())
            raise
        self._note(Succeed())

    def collect(self, replies: Mapping[K, Future[Any]], watches: Collection[Future[Any]] = ()) -> dict[K, Any]:
        """Wait for all ``replies``; return their results by key.

        Raises the first failure as StageError, also one from ``watches``, which are not awaited otherwise, and
        DeadlineExceeded if no worker finishes anything for the timeout.
        """
        for outcome in self._arriving(replies, watches):
            if isinstance(outcome, Failure):
                raise StageError.of(outcome)
        return {key: reply.result() for key, reply in replies.items()}

    def outcomes(self, replies: Mapping[K, Future[Any]]) -> dict[K, Any]:
        """Wait for all ``replies``; return their results by key, Failures and the errors of lost workers among them.

        Raises DeadlineExceeded if no worker finishes anything for the timeout.
        """
        outcomes = {key: outcome_of(reply) for key, reply in replies.items()}
        for _ in self._arriving(outcomes):
            pass
        return {key: outcome.result() for key, outcome in outcomes.items()}

    def _arriving(self, replies: Mapping[K, Future[Any]], watches: Collection[Future[Any]] = ()) -> Iterator[Any]:
        """Yield the results of ``replies`` and ``watches`` as they arrive, until all replies have arrived."""
        wanted = set(replies.values())
        pending = wanted | set(watches)
        patience = Patience(self._transport, self.workers, self._timeout)
        while pending & wanted:
            done, pending = self._transport.wait(pending, min(POLL, self._timeout / 4))
            yield from (reply.result() for reply in done)
            if not done:
                patience.check()
