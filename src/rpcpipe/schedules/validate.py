"""Proof, before anything runs, that a schedule can."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rpcpipe.errors import ScheduleError
from rpcpipe.schedules.action import Action

if TYPE_CHECKING:
    from rpcpipe.schedules.schedule import Schedule


def validate(schedule: Schedule) -> None:
    """Raise ScheduleError unless ``schedule`` is complete, well placed, ascending and free of deadlock."""
    _each_once(schedule)
    _on_its_worker(schedule)
    _complete(schedule)
    _backward_ascending(schedule)
    for _ in schedule.walk():
        pass


def _each_once(schedule: Schedule) -> None:
    counts = Counter(action for row in schedule.actions for action in row)
    twice = [str(action) for action, count in counts.items() if count > 1]
    if twice:
        raise ScheduleError(f"schedule {schedule.name!r} does {', '.join(twice[:5])} more than once")


def _on_its_worker(schedule: Schedule) -> None:
    for worker, row in enumerate(schedule.actions):
        for action in row:
            if not (0 <= action.stage < schedule.stages and 0 <= action.chunk < schedule.chunks):
                raise ScheduleError(
                    f"{action} on worker {worker} is outside {schedule.stages} stages × {schedule.chunks} micro-batches"
                )
            if schedule.placement[action.stage] != worker:
                raise ScheduleError(
                    f"{action} stands on worker {worker}, but stage {action.stage} lives on worker"
                    f" {schedule.placement[action.stage]}"
                )


def _complete(schedule: Schedule) -> None:
    present = {action for row in schedule.actions for action in row}
    forward_only = all(action.kind == "F" for action in present)
    for stage in range(schedule.stages):
        for chunk in range(schedule.chunks):
            kinds = {kind for kind in "FBIW" if Action(kind, stage, chunk) in present}  # type: ignore[arg-type]
            if kinds not in ({"F"} if forward_only else {"F", "B"}, {"F", "I", "W"}):
                wanted = "F" if forward_only else "F and either B or I and W"
                raise ScheduleError(
                    f"stage {stage}, micro-batch {chunk} has {sorted(kinds) or 'nothing'}; it needs {wanted}, each once"
                )


def _backward_ascending(schedule: Schedule) -> None:
    """Gradients are summed in ascending order of micro-batches whatever the schedule.

    That keeps every schedule's bits equal to a plain loop's; a schedule that breaks it is refused.
    """
    for worker, row in enumerate(schedule.actions):
        last: dict[int, Action] = {}
        for action in row:
            if action.kind in "BW":
                before = last.get(action.stage)
                if before is not None and before.chunk > action.chunk:
                    raise ScheduleError(
                        f"worker {worker} does {action} after {before}: a stage's weight gradients must be summed in"
                        " ascending order of micro-batches, so that every schedule gives the same bits"
                    )
                last[action.stage] = action
