"""Puts calls and values that arrive in any order back into one strict order.

torch RPC delivers messages in any order. Every task carries its place in the worker's sequence;
every value the place it is meant for. This class only decides, it neither waits nor locks: its
caller holds a lock and runs what ``take`` returns.

Invariants: tasks leave in ascending sequence without gaps, except for those that ``cancel`` drops;
a task leaves only with all values it awaits; values of a step before ``floor`` are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rpcpipe.errors import Failure
from rpcpipe.schedules import Action
from rpcpipe.worker.messages import Port
from rpcpipe.worker.operations import RunAction, Task, title


@dataclass(eq=False)
class Entry:
    """A task in its place. ``reply`` is set on the last one of a message."""

    step: int
    task: Task
    reply: Future[Any] | None = None
    values: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None


class Mailbox:
    """One pipeline's tasks and values on one worker."""

    def __init__(self) -> None:
        self.expected = 0
        self.floor = 0
        self._queue: dict[int, Entry] = {}
        self._skips: dict[int, int] = {}  # cancelled places: from, up to
        self._inbox: dict[tuple[int, Port], Any] = {}
        self._failed: dict[int, tuple[Failure, int]] = {}  # and from which group on
        self._watches: list[tuple[int, Future[Any]]] = []

    def submit(self, sequence: int, entries: Sequence[Entry]) -> list[Entry]:
        """File ``entries`` from place ``sequence`` on; returns those that come too late to run."""
        late = []
        for at, entry in enumerate(entries, sequence):
            if at < self.expected or any(first <= at < resume for first, resume in self._skips.items()):
                late.append(entry)
            else:
                self._queue[at] = entry
        return late

    def put(self, step: int, port: Port, value: Any) -> None:
        """File ``value`` for ``port``; values of steps that are over are dropped."""
        if step >= self.floor and not (step in self._failed and self._failed[step][1] == 0):
            self._inbox[step, port] = value

    def take(self) -> Entry | None:
        """The next task in sequence if nothing it awaits is missing, else None.

        A task of a failed step comes with the failure and must not run.
        """
        while self.expected in self._skips:
            self.expected = self._skips.pop(self.expected)
        entry = self._queue.get(self.expected)
        if entry is None:
            return None
        failure, group = self._failed.get(entry.step, (None, 0))
        entry.failure = failure if entry.task.group >= group else None
        if entry.failure is None:
            keys = [(entry.step, port) for port in entry.task.awaits]
            if not all(key in self._inbox for key in keys):
                return None
            entry.values = {port.slot: self._inbox.pop((step, port)) for step, port in keys}
        del self._queue[self.expected]
        self.expected += 1
        return entry

    def fail(self, step: int, failure: Failure, group: int = 0) -> None:
        """From here on every task of ``step``, from ``group`` on, ends with ``failure`` (the first one given)."""
        if step < self.floor or (step in self._failed and self._failed[step][1] <= group):
            return
        self._failed[step] = failure, group
        self._tell(step, failure)
        if group == 0:
            self._forget(lambda of: of == step)

    def watch(self, step: int) -> Future[Any]:
        """The first failure of ``step`` as soon as it is known, or None once the step is over."""
        watch: Future[Any] = Future()
        self._watches.append((step, watch))
        if step in self._failed:
            self._tell(step, self._failed[step][0])
        elif step < self.floor:
            self._tell(step, None)
        return watch

    def _tell(self, upto: int, outcome: Failure | None) -> None:
        told = [watch for step, watch in self._watches if step <= upto]
        self._watches = [(step, watch) for step, watch in self._watches if step > upto]
        for watch in told:
            watch.set_result(outcome)

    def cancel(self, step: int, first: int, resume: int) -> list[Entry]:
        """Drop the tasks from place ``first`` up to ``resume``, and all values up to ``step``.

        What has its place before ``first`` still runs, also if it comes later: it may be the undoing of
        the step before. Returns the tasks that were waiting.
        """
        dropped = [self._queue.pop(at) for at in sorted(self._queue) if first <= at < resume]
        if self.expected >= first:
            self.expected = max(self.expected, resume)
        else:
            self._skips[first] = max(resume, self._skips.get(first, 0))
        self.finish(step)
        return dropped

    def finish(self, step: int) -> None:
        """Steps up to ``step`` are over: what still comes for them is dropped."""
        self.floor = max(self.floor, step + 1)
        self._tell(step, None)
        self._forget(lambda of: of < self.floor)
        self._failed = {of: failure for of, failure in self._failed.items() if of >= self.floor}

    def _forget(self, over: Any) -> None:
        for key in [key for key in self._inbox if over(key[0])]:
            del self._inbox[key]

    def awaited(self) -> Action | None:
        """The action that is next in sequence and lacks a value, if any."""
        entry = self._queue.get(self.expected)
        operation = None if entry is None else entry.task.operation
        return operation.route.action if isinstance(operation, RunAction) else None

    def waiting_for(self) -> str:
        """The next task and the values it lacks, for a message to a person; '' if there is none."""
        entry = self._queue.get(self.expected)
        if entry is None:
            return f"waits for call {self.expected}, which has not arrived" if self._queue else ""
        missing = [port for port in entry.task.awaits if (entry.step, port) not in self._inbox]
        if not missing:
            return f"is about to run {title(entry.task.operation)}"
        return f"waits for the {' and the '.join(port.slot for port in missing)} of {missing[0].action.describe()}"
