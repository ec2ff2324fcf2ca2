"""The mailbox: restores one strict order of tasks and values that arrive in any order.

torch RPC delivers messages in any order. Every task carries its place in the worker's sequence, every
value the port that awaits it. The mailbox only decides; it neither waits nor locks. Its caller holds a
lock and runs what ``take`` returns.

Invariants: tasks leave in ascending sequence without gaps, except for those that ``cancel`` drops;
a task leaves only with all values that it awaits; values of a step before ``floor`` are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rpcpipe.errors import Failure
from rpcpipe.schedules import Action
from rpcpipe.worker.messages import Port
from rpcpipe.worker.operations import RunAction, Task
from rpcpipe.worker.programs import KEPT_PROGRAMS, Keep, Kept, Sent
from rpcpipe.worker.titles import title


@dataclass(eq=False)
class Entry:
    """A task of ``step``. The last task of a message has a ``reply``, which receives the outcome."""

    step: int
    task: Task
    reply: Future[Any] | None = None
    values: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None


class Mailbox:
    """One pipeline's tasks and values on one worker. ``expected``: the place of the next task."""

    def __init__(self, expected: int = 0) -> None:
        self.expected = expected
        self.floor = 0
        self._queue: dict[int, Entry] = {}
        self._skips: dict[int, int] = {}  # cancelled places: the first one, and the first after them
        self._inbox: dict[tuple[int, Port], Any] = {}
        self._failed: dict[int, tuple[Failure, int]] = {}  # by step: the failure, and the first group that it ends
        self._watches: list[tuple[int, Future[Any]]] = []
        self._programs: dict[int, dict[int, Task]] = {}  # kept tasks by program and place in it

    def tasks(self, sent: Sequence[Sent]) -> list[Task]:
        """Return the tasks that ``sent`` stands for; keep those that it says to keep."""
        tasks: list[Task] = []
        for item in sent:
            match item:
                case Keep(program, start, given):
                    self._keep(program, start, given)
                    tasks += given
                case Kept(program, start, stop):
                    kept = self._programs[program]
                    tasks += [kept[place] for place in range(start, stop)]
                case _:
                    tasks.append(item)
        return tasks

    def _keep(self, program: int, start: int, tasks: Sequence[Task]) -> None:
        self._programs.setdefault(program, {}).update(enumerate(tasks, start))
        for old in [number for number in self._programs if number <= program - KEPT_PROGRAMS]:
            del self._programs[old]

    def submit(self, sequence: int, entries: Sequence[Entry]) -> list[Entry]:
        """File ``entries`` from place ``sequence`` on; return the entries whose places were cancelled before."""
        late = []
        for place, entry in enumerate(entries, sequence):
            if place < self.expected or any(first <= place < resume for first, resume in self._skips.items()):
                late.append(entry)
            else:
                self._queue[place] = entry
        return late

    def put(self, step: int, port: Port, value: Any) -> None:
        """File ``value`` for ``port``; drop it if ``step`` is over or has failed."""
        if step >= self.floor and not (step in self._failed and self._failed[step][1] == 0):
            self._inbox[step, port] = value

    def is_ready(self) -> bool:
        """Return whether ``take`` would return an entry."""
        while self.expected in self._skips:
            self.expected = self._skips.pop(self.expected)
        entry = self._queue.get(self.expected)
        if entry is None:
            return False
        return self._failure_of(entry) is not None or all(
            (entry.step, port) in self._inbox for port in entry.task.awaits
        )

    def _failure_of(self, entry: Entry) -> Failure | None:
        failure, group = self._failed.get(entry.step, (None, 0))
        return failure if entry.task.group >= group else None

    def take(self) -> Entry | None:
        """Remove and return the next entry in sequence, or None while the entry or one of its values is missing.

        An entry of a failed step is returned with the failure and must not run.
        """
        if not self.is_ready():
            return None
        entry = self._queue.pop(self.expected)
        self.expected += 1
        entry.failure = self._failure_of(entry)
        if entry.failure is None:
            entry.values = {port.slot: self._inbox.pop((entry.step, port)) for port in entry.task.awaits}
        return entry

    def fail(self, step: int, failure: Failure, group: int = 0) -> None:
        """End every task of ``step``, from ``group`` on, with ``failure``; the first failure of a group stays."""
        if step < self.floor or (step in self._failed and self._failed[step][1] <= group):
            return
        self._failed[step] = failure, group
        self._resolve(step, failure)
        if group == 0:
            self._forget(lambda value_step: value_step == step)

    def watch(self, step: int) -> Future[Any]:
        """Return a future of the first failure of ``step``, or of None once the step is over."""
        watch: Future[Any] = Future()
        self._watches.append((step, watch))
        if step in self._failed:
            self._resolve(step, self._failed[step][0])
        elif step < self.floor:
            self._resolve(step, None)
        return watch

    def _resolve(self, last: int, outcome: Failure | None) -> None:
        """Resolve the watches of the steps up to ``last``."""
        resolved = [watch for step, watch in self._watches if step <= last]
        self._watches = [(step, watch) for step, watch in self._watches if step > last]
        for watch in resolved:
            watch.set_result(outcome)

    def cancel(self, step: int, first: int, resume: int) -> list[Entry]:
        """Drop the tasks from place ``first`` up to ``resume``, and all values up to ``step``.

        Tasks before ``first`` still run, even if they arrive later: one may roll back the step before.
        Returns the dropped entries that had arrived.
        """
        dropped = [self._queue.pop(place) for place in sorted(self._queue) if first <= place < resume]
        if self.expected >= first:
            self.expected = max(self.expected, resume)
        else:
            self._skips[first] = max(resume, self._skips.get(first, 0))
        self.finish(step)
        return dropped

    def finish(self, step: int) -> None:
        """End the steps up to ``step``: drop their values, including those that arrive later."""
        self.floor = max(self.floor, step + 1)
        self._resolve(step, None)
        self._forget(lambda value_step: value_step < self.floor)
        self._failed = {failed: failure for failed, failure in self._failed.items() if failed >= self.floor}

    def _forget(self, over: Callable[[int], bool]) -> None:
        """Drop the values of every step for which ``over(step)`` is true."""
        for key in [key for key in self._inbox if over(key[0])]:
            del self._inbox[key]

    def awaited(self) -> Action | None:
        """Return the action that is next in sequence, or None if the next task is no action or has not arrived."""
        entry = self._queue.get(self.expected)
        operation = None if entry is None else entry.task.operation
        return operation.route.action if isinstance(operation, RunAction) else None

    def waiting_for(self) -> str:
        """Describe the next task and the values that it lacks, for a user; '' if no task is filed."""
        entry = self._queue.get(self.expected)
        if entry is None:
            return f"waits for call {self.expected}, which has not arrived" if self._queue else ""
        missing = [port for port in entry.task.awaits if (entry.step, port) not in self._inbox]
        if not missing:
            return f"is about to run {title(entry.task.operation)}"
        return f"waits for the {' and the '.join(port.slot for port in missing)} of {missing[0].action.describe()}"
