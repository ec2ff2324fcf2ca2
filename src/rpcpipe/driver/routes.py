"""A schedule, addressed: for every action the values it awaits and where its results go.

Derived from ``Schedule.upstream`` and its inverse, so the rule of what waits for what stays in one
place. Named values add ports and no dependency: their ways lead from stage to later stage, and there
the running value's forward, and back the gradient's backward, has gone before them stage by stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rpcpipe.model.microbatch import Nest
from rpcpipe.model.wiring import DRIVER, Hop, link
from rpcpipe.schedules import Action, Schedule
from rpcpipe.stage.autograd import Received
from rpcpipe.worker.messages import Port, Route, Send


def compile_routes(
    schedule: Schedule, workers: Sequence[str], *, targets: bool, hops: Sequence[Hop] = ()
) -> list[tuple[str, Route]]:
    """(worker, route) for every action, in an order in which everything could run one by one.

    ``targets``: the last stage awaits the targets as well. ``hops``: the ways of named values.
    """
    return [(workers[at], route(schedule, action, workers, targets, hops)) for at, action, _ in schedule.walk()]


def route(schedule: Schedule, action: Action, workers: Sequence[str], targets: bool, hops: Sequence[Hop] = ()) -> Route:
    """What ``action`` awaits and where its results go."""
    kind, stage, chunk = action
    before = {hop.source for hop in hops if hop.target == stage and hop.source != stage - 1}
    behind = {hop.target for hop in hops if hop.source == stage and hop.target != stage + 1}
    awaits: list[str] = []
    ends: list[Action] = []
    if schedule.upstream(action) is not None or (kind == "F" and stage == 0):
        awaits.append("input")
    if (consumer := schedule.consumer(action)) is not None:
        ends.append(consumer)
    if kind == "F":
        awaits += [link(stage, other) for other in sorted(before)]
        ends += [Action("F", other, chunk) for other in sorted(behind)]
    elif kind in "BI":
        awaits += [link(stage, other) for other in sorted(behind)]
        ends += [schedule.input_gradient(other, chunk) for other in sorted(before - {DRIVER})]
    if targets and kind == "F" and stage == schedule.stages - 1:
        awaits.append("target")
    sends = [
        Send(link(stage, end.stage), workers[schedule.placement[end.stage]], Port(end, link(end.stage, stage)))
        for end in ends
    ]
    return Route(action, tuple(Port(action, slot) for slot in awaits), tuple(sends))


def given(inputs: list[Nest], targets: list[Nest] | None, stages: int, hops: Sequence[Hop] = ()) -> dict[Port, Any]:
    """The driver's inputs and targets by the port that awaits them."""
    values = {port: value for chunk, part in enumerate(inputs) for port, value in entering(part, chunk, hops).items()}
    if targets is not None:
        if len(targets) != len(inputs):
            raise ValueError(
                f"inputs make {len(inputs)} micro-batches and targets {len(targets)}: their batch sizes differ"
            )
        values |= {Port(Action("F", stages - 1, chunk), "target"): part for chunk, part in enumerate(targets)}
    return values


def entering(part: Nest, chunk: int, hops: Sequence[Hop]) -> dict[Port, Received]:
    """What each stage gets from the driver of micro-batch ``chunk``'s inputs ``part``."""
    names: dict[int, list[str]] = {0: []}
    for hop in hops:
        if hop.source == DRIVER:
            names.setdefault(hop.target, []).append(hop.name)
    return {
        Port(Action("F", stage, chunk), link(stage, DRIVER)): Received.constant(
            (None if stage else part, {name: part[name] for name in wanted})
        )
        for stage, wanted in names.items()
    }
