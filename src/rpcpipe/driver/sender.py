"""Send tasks to the workers, each to the next place in its worker's sequence.

A training step's tasks are the same every time, so they travel once: workers keep a program's tasks (``Keep``), and
from the second step on a message refers to them (``Kept``). Of forward passes several may be under way, whose messages
arrive in any order, so a worker might drop a program to which a late message refers: their tasks travel whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any
from weakref import WeakKeyDictionary

from rpcpipe.driver.program import Program
from rpcpipe.stage.context import StepContext
from rpcpipe.transport.base import Transport
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.messages import Port
from rpcpipe.worker.operations import KEPT_PROGRAMS, BeginStep, Keep, Kept, Sent, Task, places

Values = Sequence[tuple[Port, Any]]
# What ``submit`` and ``accept`` take: pipeline, step, place, what is sent, values.
Arguments = tuple[str, int, int, Sequence[Sent], Values]


class Sender:
    """Sends one pipeline's tasks. ``before(step)`` runs before each message. ``next``: by worker, its next place."""

    def __init__(
        self, transport: Transport, pipeline: str, workers: Sequence[str], before: Callable[[int], None]
    ) -> None:
        self.next = dict.fromkeys(workers, 0)
        self._held: list[object] = []
        self._transport, self._pipeline, self._before = transport, pipeline, before
        self._newest = 0
        # By program the number under which workers have been sent its tasks, and whether all have them for certain.
        self._numbers: WeakKeyDictionary[Program, tuple[int, bool]] = WeakKeyDictionary()

    def post(self, worker: str, step: int, sent: Sequence[Sent], values: Values = ()) -> Future[Any]:
        """Send tasks of ``step``, and ``values`` for them; return the last task's reply."""
        with shield_interrupts():  # a place that is taken but not sent would block the worker's sequence
            return self._transport.call(worker, "submit", *self._arguments(worker, step, sent, values))

    def remote(self, worker: str, task: Task) -> Any:
        """Send a task of no step; keep its result on the worker and return an RRef to it."""
        with shield_interrupts():
            return self._transport.remote(worker, "submit", *self._arguments(worker, -1, [task], ()), later=True)

    def hold(self, worker: str, step: int, sent: Sequence[Sent], values: Values = ()) -> object:
        """Send tasks by a call that is answered at once; return its RRef."""
        with shield_interrupts():
            return self._transport.remote(worker, "accept", *self._arguments(worker, step, sent, values))

    def issue(
        self,
        program: Program,
        plan: StepContext,
        values: Mapping[Port, Any],
        ends: Mapping[str, list[Task]],
        *,
        keep: bool,
    ) -> dict[str, Future[Any]]:
        """Send one call per action and keep its RRef until the step is over; return the replies of ``ends``.

        ``keep``: workers keep the tasks; no other step is under way.
        """
        self._held = []
        given = program.values_for(values)
        begin: dict[str, list[Sent]] = {worker: [Task(BeginStep(plan))] for worker in self.next}
        start = dict.fromkeys(self.next, 0)
        for worker, tasks in program.calls:
            own = [(port, values[port]) for task in tasks for port in task.awaits if port in values]
            own = own if worker in given else []
            part = self._part(program, tasks, start[worker]) if keep else tasks
            sent = [*(first := begin.pop(worker, [])), *part]
            start[worker] += len(tasks)
            self._held.append(self.hold(worker, plan.step, sent, own))
            # By a lane one message more, once the first action can begin; else each call carries its own.
            if first and worker in given and self._transport.is_near(worker):
                sent_ports = {port for port, _ in own}
                rest = [pair for pair in given.pop(worker) if pair[0] not in sent_ports]
                self._supply(worker, plan.step, rest)
        return {worker: self.post(worker, plan.step, [*begin.get(worker, []), *ends[worker]]) for worker in self.next}

    def issue_batched(
        self,
        program: Program,
        plan: StepContext,
        values: Mapping[Port, Any],
        ends: Mapping[str, list[Task]],
        *,
        keep: bool,
    ) -> dict[str, Future[Any]]:
        """Send the same tasks as ``issue``, in one message per worker; return the same replies."""
        given, replies = program.values_for(values), {}
        for worker in self.next:
            tasks = program.tasks.get(worker, [])
            part = self._part(program, tasks, 0) if keep and tasks else tasks
            sent = [Task(BeginStep(plan)), *part, *ends[worker]]
            replies[worker] = self.post(worker, plan.step, sent, given.get(worker, ()))
        return replies

    def confirm(self, program: Program) -> None:
        """Refer to the tasks of ``program`` from now on: a step of it has succeeded, so all workers have them."""
        self._numbers[program] = self._numbers[program][0], True

    def forget(self, program: Program | None = None) -> None:
        """Let the RRefs of the last step go; send the tasks of ``program`` anew: some worker may not have them."""
        self._held.clear()
        if program is not None:
            self._numbers.pop(program, None)

    def _part(self, program: Program, tasks: Sequence[Task], start: int) -> list[Sent]:
        """Return what stands for ``tasks``, which are those of ``program`` on their worker from ``start`` on."""
        number, known = self._numbers.get(program, (-KEPT_PROGRAMS, False))
        if number <= self._newest - KEPT_PROGRAMS:
            self._newest += 1
            number, known = self._numbers[program] = self._newest, False
        return [Kept(number, start, start + len(tasks)) if known else Keep(number, start, tuple(tasks))]

    def _arguments(self, worker: str, step: int, sent: Sequence[Sent], values: Values) -> Arguments:
        """Take the tasks' places in the worker's sequence; return the arguments of ``submit`` and ``accept``."""
        self._before(step)
        if values and self._transport.is_near(worker):
            self._supply(worker, step, values)
            values = ()
        place = self.next[worker]
        self.next[worker] += places(sent)
        return self._pipeline, step, place, sent, values

    def _supply(self, worker: str, step: int, values: Values) -> None:
        if values:
            self._transport.send(worker, "supply", self._pipeline, step, values)
