"""Send tasks to the workers, each to the next place in its worker's sequence.

A training step's tasks are the same every time, so they travel once: workers keep a program's tasks (``Keep``), and
from the second step on a message refers to them (``Kept``). Of forward passes several may be under way, whose messages
arrive in any order, so a worker might drop a program to which a late message refers: their tasks travel whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from rpcpipe.driver.program import Program
from rpcpipe.stage.context import StepContext
from rpcpipe.transport.base import Transport
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.messages import Port
from rpcpipe.worker.operations import BeginStep, Task
from rpcpipe.worker.programs import KEPT_PROGRAMS, Keep, Kept, Sent, places

Values = Sequence[tuple[Port, Any]]
# What ``submit`` and ``accept`` take: pipeline, step, place, what is sent, values.
Arguments = tuple[str, int, int, Sequence[Sent], Values]


class Issue(NamedTuple):
    """The calls of one step: its program, its driver's values by port, and by worker the tasks that end it.

    ``keep``: workers keep the program's tasks; of steps under way, only the one before may be another.
    """

    program: Program
    plan: StepContext
    values: Mapping[Port, Any]
    ends: Mapping[str, list[Task]]
    keep: bool


class Sender:
    """Sends one pipeline's tasks. ``before(step)`` runs before each message. ``next``: by worker, its next place."""

    def __init__(
        self, transport: Transport, pipeline: str, workers: Sequence[str], before: Callable[[int], None]
    ) -> None:
        self.next = dict.fromkeys(workers, 0)
        self._held: dict[int, list[object]] = {}  # by step
        self._transport, self._pipeline, self._before = transport, pipeline, before
        self._newest = 0
        # By program the number under which workers have been sent its tasks, and whether all have them for certain.
        self._numbers: WeakKeyDictionary[Program, tuple[int, bool]] = WeakKeyDictionary()

    def post(self, worker: str, step: int, sent: Sequence[Sent], values: Values = ()) -> Future[Any]:
        """Send tasks of ``step``, and ``values`` for them; return the last task's reply."""
        with shield_interrupts():
            arguments, apart = self._arguments(worker, step, sent, values)
            reply = self._transport.call(worker, "submit", *arguments)
            self.next[worker] += places(sent)
            self._supply(worker, step, apart)
            return reply

    def remote(self, worker: str, task: Task) -> Any:
        """Send a task of no step; keep its result on the worker and return an RRef to it."""
        with shield_interrupts():
            arguments, _ = self._arguments(worker, -1, [task], ())
            handle = self._transport.remote(worker, "submit", *arguments, later=True)
            self.next[worker] += places([task])
            return handle

    def hold(self, worker: str, step: int, sent: Sequence[Sent], values: Values = ()) -> object:
        """Send tasks by a call that is answered at once; return its RRef."""
        with shield_interrupts():
            arguments, apart = self._arguments(worker, step, sent, values)
            handle = self._transport.remote(worker, "accept", *arguments)
            self.next[worker] += places(sent)
            self._supply(worker, step, apart)
            return handle

    def issue(self, step: Issue) -> dict[str, Future[Any]]:
        """Send one call per action and keep its RRef until the step is over; return the replies of ``step.ends``."""
        held = self._held[step.plan.step] = []
        number, given = step.plan.step, step.program.values_for(step.values)
        begin: dict[str, list[Sent]] = {worker: [Task(BeginStep(step.plan))] for worker in self.next}
        start = dict.fromkeys(self.next, 0)
        for worker, tasks in step.program.calls:
            awaits = [port for task in tasks for port in task.awaits if port in step.values] if worker in given else []
            first = begin.pop(worker, [])
            sent = [*first, *self._part(step, tasks, start[worker])]
            start[worker] += len(tasks)
            own = [(port, step.values[port]) for port in awaits]
            held.append(self.hold(worker, number, sent, own))
            # By a lane one message more, once the first action can begin; else each call carries its own.
            if first and worker in given and self._transport.is_near(worker):
                self._supply(worker, number, [pair for pair in given.pop(worker) if pair[0] not in awaits])
        return {worker: self.post(worker, number, [*begin.get(worker, []), *step.ends[worker]]) for worker in self.next}

    def issue_batched(self, step: Issue) -> dict[str, Future[Any]]:
        """Send the same tasks as ``issue``, in one message per worker; return the same replies."""
        given, replies = step.program.values_for(step.values), {}
        for worker in self.next:
            part = self._part(step, step.program.tasks.get(worker, []), 0)
            sent = [Task(BeginStep(step.plan)), *part, *step.ends[worker]]
            replies[worker] = self.post(worker, step.plan.step, sent, given.get(worker, ()))
        return replies

    def confirm(self, program: Program) -> None:
        """Refer to the tasks of ``program`` from now on: a step of it has succeeded, so all workers have them."""
        self._numbers[program] = self._numbers[program][0], True

    def forget(self, program: Program) -> None:
        """Send the tasks of ``program`` anew: some worker may not have them."""
        self._numbers.pop(program, None)

    def forget_all(self) -> None:
        """Send the tasks of all programs anew: a worker has none."""
        self._numbers.clear()

    def release(self, step: int) -> None:
        """Let the RRefs of the steps up to ``step`` go."""
        self._held = {later: held for later, held in self._held.items() if later > step}

    def _part(self, step: Issue, tasks: Sequence[Task], start: int) -> Sequence[Sent]:
        """Return what stands for ``tasks``, which are those of the program on their worker from ``start`` on."""
        if not step.keep or not tasks:
            return tasks
        program = step.program
        number, known = self._numbers.get(program, (-KEPT_PROGRAMS, False))
        # One more than workers drop: a message of the step ahead, with a new program, may overtake this one.
        if number <= self._newest - KEPT_PROGRAMS + 1:
            self._newest += 1
            number, known = self._numbers[program] = self._newest, False
        return [Kept(number, start, start + len(tasks)) if known else Keep(number, start, tuple(tasks))]

    def _arguments(self, worker: str, step: int, sent: Sequence[Sent], values: Values) -> tuple[Arguments, Values]:
        """Return the arguments of ``submit`` and ``accept``, with the tasks' place in the worker's sequence.

        Also returns the values to be sent apart, after the tasks: the worker begins meanwhile. The caller takes the
        places once the message is on its way: what cannot be pickled raises before, and a place that is taken and not
        sent would block the worker for ever.
        """
        self._before(step)
        apart: Values = ()
        if values and self._transport.is_near(worker):
            values, apart = apart, values
        return (self._pipeline, step, self.next[worker], sent, values), apart

    def _supply(self, worker: str, step: int, values: Values) -> None:
        if values:
            self._transport.send(worker, "supply", self._pipeline, step, values)
