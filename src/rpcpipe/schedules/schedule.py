"""A schedule as data, and the one rule of what waits for what.

The validator, the simulator, the renderer, the driver and the workers all read the same object,
so the schedule that is drawn is the schedule that runs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rpcpipe import _tables
from rpcpipe.errors import ScheduleError
from rpcpipe.schedules.action import Action

if TYPE_CHECKING:
    from rpcpipe.schedules.simulate import Costs
    from rpcpipe.schedules.timeline import Timeline


_HEADER = ("worker", "stages", "actions", "first")
_SHOWN = 12


@dataclass(frozen=True, repr=False)
class Schedule:
    """What every worker does, in order.

    ``placement[stage]`` is the worker that holds the stage; ``actions[worker]`` is executed
    strictly in its order. ``chunks`` is the number of micro-batches of a step.
    """

    name: str
    chunks: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    def __repr__(self) -> str:
        sizes = f"{self.workers} workers, {self.stages} stages, {self.chunks} micro-batches"
        return f"Schedule({self.name}: {sizes})\n{_tables.text(_HEADER, self._rows())}"

    def _repr_html_(self) -> str:
        return _tables.markup(f"Schedule {self.name}, {self.chunks} micro-batches", _HEADER, self._rows())

    def _rows(self) -> list[list[str]]:
        rows = []
        for worker, actions in enumerate(self.actions):
            stages = ", ".join(str(stage) for stage, holder in enumerate(self.placement) if holder == worker)
            first = " ".join(map(str, actions[:_SHOWN])) + (" …" if len(actions) > _SHOWN else "")
            rows.append([f"worker {worker}", stages, str(len(actions)), first])
        return rows

    @property
    def workers(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @cached_property
    def _all(self) -> frozenset[Action]:
        return frozenset(action for worker in self.actions for action in worker)

    @cached_property
    def _split(self) -> frozenset[tuple[int, int]]:
        """(stage, chunk) whose backward is split into I and W."""
        return frozenset((action[1], action[2]) for worker in self.actions for action in worker if action[0] == "I")

    @cached_property
    def asynchronous(self) -> bool:
        """Does it update weights while micro-batches are in flight?"""
        return any(action[0] == "U" for worker in self.actions for action in worker)

    def input_gradient(self, stage: int, chunk: int) -> Action:
        """The action that yields the gradient of the stage's input: ``I`` where split, else ``B``."""
        return Action("I" if (stage, chunk) in self._split else "B", stage, chunk)

    def upstream(self, action: Action) -> Action | None:
        """The action of the neighbouring stage whose result ``action`` consumes, if any."""
        kind, stage, chunk = action
        if kind == "F":
            return Action("F", stage - 1, chunk) if stage else None
        if kind in "WU" or stage == len(self.placement) - 1:
            return None
        return self.input_gradient(stage + 1, chunk)

    def dependencies(self, action: Action) -> tuple[Action, ...]:
        """Everything that must have finished before ``action`` can start.

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

    def consumer(self, action: Action) -> Action | None:
        """The neighbouring stage's action that is fed by ``action``: the inverse of ``upstream``."""
        kind, stage, chunk = action
        if kind in "WU":
            return None
        if kind == "F":
            return Action("F", stage + 1, chunk) if stage + 1 < len(self.placement) else None
        return self.input_gradient(stage - 1, chunk) if stage else None

    def walk(self, done: dict[Action, float] | None = None) -> Iterator[tuple[int, Action, tuple[Action, ...]]]:
        """Yield (worker, action, its dependencies) in an order in which everything can run.

        ``done`` gets every action once it is yielded; a caller may put its own value there first.
        Raises ScheduleError, once nothing more can run, naming for every blocked worker the
        action it stands at and what that waits for.
        """
        done = {} if done is None else done
        position = [0] * self.workers
        waiting: dict[Action, list[int]] = {}
        runnable = list(range(self.workers))[::-1]
        while runnable:
            worker = runnable.pop()
            mine, at = self.actions[worker], position[worker]
            while at < len(mine):
                action = mine[at]
                needed = self.dependencies(action)
                missing = next((d for d in needed if d not in done), None)
                if missing is not None:
                    waiting.setdefault(missing, []).append(worker)
                    break
                yield worker, action, needed
                done.setdefault(action, 0.0)
                runnable.extend(waiting.pop(action, ()))
                at += 1
            position[worker] = at
        self._refuse_blocked(waiting, position)

    def _refuse_blocked(self, waiting: dict[Action, list[int]], position: list[int]) -> None:
        blocked = [
            f"worker {worker} stands at {self.actions[worker][position[worker]]} and waits for {missing}"
            f" ({'which no worker does' if missing not in self._all else f'worker {self.placement[missing.stage]}'})"
            for missing, workers in waiting.items()
            for worker in workers
        ]
        if blocked:
            raise ScheduleError(f"schedule {self.name!r} can never finish: " + "; ".join(sorted(blocked)))

    def validate(self) -> Schedule:
        """Prove that every action appears once, on its worker, and that no order deadlocks."""
        from rpcpipe.schedules.validate import validate

        validate(self)
        return self

    def truncated(self, chunks: int, first: int = 0) -> Schedule:
        """The same order without the micro-batches from ``chunks`` on, for a batch that makes fewer.

        They are numbered from ``first``. Valid where this one is: dependencies join actions of one
        micro-batch only.
        """
        rows = tuple(
            tuple(Action(kind, stage, first + chunk) for kind, stage, chunk in row if chunk < chunks)
            for row in self.actions
        )
        return Schedule(self.name, chunks, self.placement, rows)

    def simulate(self, costs: Costs | None = None) -> Timeline:
        """Predict the step's timeline; ``costs`` defaults to F = I = W = 1, free communication."""
        from rpcpipe.schedules.simulate import simulate

        return simulate(self, costs)

    def to_csv(self) -> str:
        """One line per worker in torch.distributed.pipelining's action notation."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([str(a) for a in worker] for worker in self.actions)
        return out.getvalue()

    @classmethod
    def from_csv(cls, text: str, *, name: str = "csv") -> Schedule:
        """Read torch.distributed.pipelining's compute-only CSV; empty cells are idle and dropped."""
        rows = [
            tuple(Action.parse(cell) for cell in row if cell.strip())
            for row in csv.reader(io.StringIO(text))
            if any(cell.strip() for cell in row)
        ]
        return cls.from_actions(rows, name=name)

    @classmethod
    def from_actions(cls, workers: Iterable[Iterable[Action]], *, name: str = "custom") -> Schedule:
        """Build and validate a schedule of your own from each worker's actions in order.

        Anything that yields will do: ``from_actions(generate(rank) for rank in range(4))``.
        """
        rows = [tuple(row) for row in workers]
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
        chunks = 1 + max(action.chunk for row in rows for action in row)
        where = tuple(placement[stage] for stage in range(len(placement)))
        return cls(name, chunks, where, tuple(rows)).validate()
