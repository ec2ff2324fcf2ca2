"""A schedule, addressed: for every action the values it awaits and where its result goes.

Derived from ``Schedule.upstream`` and its inverse alone, so the rule of what waits for what stays
in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rpcpipe.backward import Received
from rpcpipe.messages import Port, Route
from rpcpipe.microbatch import Nest
from rpcpipe.schedules import Action, Schedule


def compile_routes(schedule: Schedule, workers: Sequence[str], *, targets: bool) -> list[tuple[str, Route]]:
    """(worker, route) for every action, in an order in which everything could run one by one.

    ``targets``: the last stage awaits the targets as well.
    """
    return [(workers[at], route(schedule, action, workers, targets)) for at, action, _ in schedule.walk()]


def route(schedule: Schedule, action: Action, workers: Sequence[str], targets: bool) -> Route:
    """What ``action`` awaits and where its result goes."""
    awaits = []
    if schedule.upstream(action) is not None or (action.kind == "F" and action.stage == 0):
        awaits.append(Port(action, "input"))
    if targets and action.kind == "F" and action.stage == schedule.stages - 1:
        awaits.append(Port(action, "target"))
    consumer = schedule.consumer(action)
    worker = None if consumer is None else workers[schedule.placement[consumer.stage]]
    return Route(action, tuple(awaits), worker, consumer)


def given(inputs: list[Nest], targets: list[Nest] | None, stages: int) -> dict[Port, Any]:
    """The driver's inputs and targets by the port that awaits them."""
    values: dict[Port, Any] = {
        Port(Action("F", 0, chunk), "input"): Received.constant(part) for chunk, part in enumerate(inputs)
    }
    if targets is not None:
        if len(targets) != len(inputs):
            raise ValueError(
                f"inputs make {len(inputs)} micro-batches and targets {len(targets)}: their batch sizes differ"
            )
        values |= {Port(Action("F", stages - 1, chunk), "target"): part for chunk, part in enumerate(targets)}
    return values
