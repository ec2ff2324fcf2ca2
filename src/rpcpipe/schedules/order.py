"""The order of a schedule as data, and the only statement of which action waits for which.

The simulator, the renderer, the driver and the workers read the same object, so the schedule that is
drawn is the schedule that runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from rpcpipe.errors import ScheduleError
from rpcpipe.schedules.action import KINDS, Action


@dataclass(frozen=True)
class Order:
    """The actions of every worker, in the order in which it executes them.

    ``placement[stage]`` is the worker that holds the stage, ``actions[worker]`` the worker's actions.
    ``chunks`` is the number of micro-batches of a step.
    """

    name: str
    chunks: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @classmethod
    def from_actions(cls, workers: Iterable[Iterable[Action]], *, name: str = "custom") -> Self:
        """Build and validate an order from each worker's actions, given by any iterables.

        For instance ``Schedule.from_actions(generate(rank) for rank in range(4))``. Raises ScheduleError
        for an order that is incomplete, wrongly placed or can never finish.
        """
        rows = tuple(tuple(row) for row in workers)
        _check_actions(name, rows)
        chunks = 1 + max((action.chunk for row in rows for action in row), default=0)
        return cls(name, chunks, _placement(rows), rows).validate()

    @property
    def workers(self) -> int:
        """The number of workers."""
        return len(self.actions)

    @property
    def stages(self) -> int:
        """The number of stages of all workers together."""
        return len(self.placement)

    @cached_property
    def asynchronous(self) -> bool:
        """Whether weights are updated while micro-batches are in flight."""
        return any(action[0] == "U" for row in self.actions for action in row)

    # --- dependencies ---

    @cached_property
    def _all(self) -> frozenset[Action]:
        return frozenset(action for row in self.actions for action in row)

    @cached_property
    def _split(self) -> frozenset[tuple[int, int]]:
        """(stage, chunk) whose backward is split into I and W."""
        return frozenset((action[1], action[2]) for row in self.actions for action in row if action[0] == "I")

    def input_gradient(self, stage: int, chunk: int) -> Action:
        """Return the action that yields the gradient of the stage's input: ``I`` where split, else ``B``."""
        return Action("I" if (stage, chunk) in self._split else "B", stage, chunk)

    def upstream(self, action: Action) -> Action | None:
        """Return the neighbouring stage's action whose result ``action`` consumes, if any."""
        kind, stage, chunk = action
        if kind == "F":
            return Action("F", stage - 1, chunk) if stage else None
        if kind in "WU" or stage == len(self.placement) - 1:
            return None
        return self.input_gradient(stage + 1, chunk)

    def consumer(self, action: Action) -> Action | None:
        """Return the neighbouring stage's action that consumes ``action``'s result: the inverse of ``upstream``."""
        kind, stage, chunk = action
        if kind in "WU":
            return None
        if kind == "F":
            return Action("F", stage + 1, chunk) if stage + 1 < len(self.placement) else None
        return self.input_gradient(stage - 1, chunk) if stage else None

    def leaves_worker(self, action: Action) -> bool:
        """Return whether ``action``'s result is consumed on another worker."""
        consumer = self.consumer(action)
        return consumer is not None and self.placement[consumer.stage] != self.placement[action.stage]

    def dependencies(self, action: Action) -> tuple[Action, ...]:
        """Return the actions that must have finished before ``action`` can start.

        F(s, c) waits for F(s-1, c). B or I(s, c) waits for F(s, c) and for the input gradient of
        stage s+1. W(s, c) waits for I(s, c), U(s, c) for B(s, c). This is the only statement of it.
        """
        kind, stage, chunk = action
        upstream = self.upstream(action)
        if kind == "F":
            return () if upstream is None else (upstream,)
        if kind == "W":
            return (Action("I", stage, chunk),)
        if kind == "U":
            return (Action("B", stage, chunk),)
        own = Action("F", stage, chunk)
        return (own,) if upstream is None else (own, upstream)

    def walk(self, done: dict[Action, float] | None = None) -> Iterator[tuple[int, Action, tuple[Action, ...]]]:
        """Yield (worker, action, its dependencies) in an order in which all actions can run one by one.

        Adds every action to ``done`` after yielding it; a caller may store a value of its own there first.
        Raises ScheduleError once nothing more can run, naming for every blocked worker the
        action it stands at and what that waits for.
        """
        done = {} if done is None else done
        positions = [0] * self.workers
        waiting: dict[Action, list[int]] = {}
        runnable = list(range(self.workers))[::-1]
        while runnable:
            worker = runnable.pop()
            row, position = self.actions[worker], positions[worker]
            while position < len(row):
                action = row[position]
                needed = self.dependencies(action)
                missing = next((dependency for dependency in needed if dependency not in done), None)
                if missing is not None:
                    waiting.setdefault(missing, []).append(worker)
                    break
                yield worker, action, needed
                done.setdefault(action, 0.0)
                runnable.extend(waiting.pop(action, ()))
                position += 1
            positions[worker] = position
        self._check_none_blocked(waiting, positions)

    def _check_none_blocked(self, waiting: dict[Action, list[int]], positions: list[int]) -> None:
        blocked = [
            f"worker {worker} stands at {self.actions[worker][positions[worker]]} and waits for {missing}"
            f" ({'which no worker does' if missing not in self._all else f'worker {self.placement[missing.stage]}'})"
            for missing, workers in waiting.items()
            for worker in workers
        ]
        if blocked:
            raise ScheduleError(f"schedule {self.name!r} can never finish: " + "; ".join(sorted(blocked)))

    def truncated(self, chunks: int, first: int = 0) -> Self:
        """Return this order without the micro-batches from ``chunks`` on, for a batch that has fewer.

        The remaining ones are numbered from ``first``. The result of a valid order is valid: dependencies
        join actions of one micro-batch only.
        """
        rows = tuple(
            tuple(Action(kind, stage, first + chunk) for kind, stage, chunk in row if chunk < chunks)
            for row in self.actions
        )
        return replace(self, chunks=chunks, actions=rows)

    # --- validation ---

    def validate(self) -> Self:
        """Prove that every action appears once, on its worker, and that no order deadlocks.

        Returns the order itself. Raises ScheduleError with the first violation. An order of forwards alone is
        valid: inference can run it, training cannot.
        """
        _check_actions(self.name, self.actions)
        self._check_unique()
        self._check_placement()
        self._check_complete()
        self._check_ascending()
        for _ in self.walk():
            pass
        return self

    def check_backward(self) -> None:
        """Raise ScheduleError for an order of forwards alone, under which nothing could be trained."""
        if all(action.kind == "F" for action in self._all):
            raise ScheduleError(
                f"schedule {self.name!r} has forwards alone and would train nothing: give every stage and micro-batch"
                " a B, or an I and a W; pipe(inputs) and pipe.predict run forward under any schedule"
            )

    def _check_unique(self) -> None:
        counts = Counter(action for row in self.actions for action in row)
        twice = [str(action) for action, count in counts.items() if count > 1]
        if twice:
            raise ScheduleError(f"schedule {self.name!r} does {', '.join(twice[:5])} more than once")

    def _check_placement(self) -> None:
        for worker, row in enumerate(self.actions):
            for action in row:
                if not (0 <= action.stage < self.stages and 0 <= action.chunk < self.chunks):
                    raise ScheduleError(
                        f"{action} on worker {worker} is outside {self.stages} stages × {self.chunks} micro-batches"
                    )
                if self.placement[action.stage] != worker:
                    raise ScheduleError(
                        f"{action} stands on worker {worker}, but stage {action.stage} lives on worker"
                        f" {self.placement[action.stage]}"
                    )

    def _check_complete(self) -> None:
        forward_only = all(action.kind == "F" for action in self._all)
        for stage in range(self.stages):
            for chunk in range(self.chunks):
                kinds = {kind for kind in "FBIW" if Action(kind, stage, chunk) in self._all}  # type: ignore[arg-type]
                if kinds not in ({"F"} if forward_only else {"F", "B"}, {"F", "I", "W"}):
                    wanted = "F" if forward_only else "F and either B or I and W"
                    raise ScheduleError(
                        f"stage {stage}, micro-batch {chunk} has {sorted(kinds) or 'nothing'}; it needs {wanted},"
                        " each once"
                    )

    def _check_ascending(self) -> None:
        """Raise ScheduleError unless every stage's weight gradients are summed in ascending order of micro-batches.

        That order makes every schedule's bits equal to those of a plain loop.
        """
        for worker, row in enumerate(self.actions):
            last: dict[int, Action] = {}
            for action in row:
                if action.kind in "BW":
                    before = last.get(action.stage)
                    if before is not None and before.chunk > action.chunk:
                        raise ScheduleError(
                            f"worker {worker} does {action} after {before}: a stage's weight gradients must be summed"
                            " in ascending order of micro-batches, so that every schedule gives the same bits"
                        )
                    last[action.stage] = action


def _check_actions(name: str, rows: Iterable[Sequence[object]]) -> None:
    """Raise ScheduleError for a worker without actions, and for what is no Action."""
    for worker, row in enumerate(rows):
        if not row:
            raise ScheduleError(f"schedule {name!r} gives worker {worker} nothing to do; leave its row out")
        for action in row:
            if not (isinstance(action, Action) and action.kind in KINDS and type(action[1]) is type(action[2]) is int):
                raise ScheduleError(
                    f"{action!r} on worker {worker} is no action: make it Action(kind, stage, micro-batch) with a kind"
                    f" of {', '.join(KINDS)}, or read it with Action.parse('0F3')"
                )


def _placement(rows: Iterable[Iterable[Action]]) -> tuple[int, ...]:
    """Return the worker of every stage; raises ScheduleError where a stage has two, or none."""
    placement: dict[int, int] = {}
    for worker, row in enumerate(rows):
        for action in row:
            if placement.setdefault(action.stage, worker) != worker:
                raise ScheduleError(
                    f"stage {action.stage} appears on workers {placement[action.stage]} and {worker};"
                    " a stage lives on one worker"
                )
    if not placement or sorted(placement) != list(range(len(placement))):
        raise ScheduleError(f"stages must be numbered 0 … K-1 without gaps, not {sorted(placement)}")
    return tuple(placement[stage] for stage in range(len(placement)))
