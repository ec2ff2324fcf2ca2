"""What travels between the driver and the workers: plain named tuples, cheap to pickle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rpcpipe.microbatch import Packed
from rpcpipe.schedules.action import Action


class Port(NamedTuple):
    """One of the values an action waits for: ``slot`` is "input" or "target"."""

    action: Action
    slot: str


class Route(NamedTuple):
    """An action, what it waits for from elsewhere, and where its result goes."""

    action: Action
    awaits: tuple[Port, ...]
    worker: str | None
    consumer: Action | None


class Task(NamedTuple):
    """One entry of a worker's strict sequence: operation ``op`` of its actor."""

    op: str
    args: tuple[Any, ...] = ()
    awaits: tuple[Port, ...] = ()


class StepPlan(NamedTuple):
    """What a worker knows about the step it executes.

    ``step`` names it in every message and is never used again. ``draw`` seeds its random numbers:
    the number of training steps done so far, so that neither a failed step nor an evaluation in
    between changes what is drawn. ``weights[chunk]`` is the micro-batch's share of the batch: its
    loss counts that much.
    """

    step: int
    draw: int
    training: bool
    weights: tuple[float, ...]
    keep_outputs: bool = False
    trace: bool = False


@dataclass
class Report:
    """One worker's account of a step.

    ``losses`` holds (value, count) per micro-batch on the last stage, count None for a mean;
    ``norms`` the 2-norm of every parameter's summed gradient, by stage, in the model's order;
    ``spans`` holds (kind, stage, chunk, start, end) in nanoseconds of the worker's monotonic clock.
    Where the step is traced, ``sends`` holds (producer, consumer, time) and ``arrivals`` (consumer,
    time) of the values that other workers got from or gave to this one.
    """

    worker: str
    losses: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    outputs: dict[int, Packed] = field(default_factory=dict)
    norms: dict[int, list[float]] = field(default_factory=dict)
    spans: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    sends: list[tuple[Action, Action, int]] = field(default_factory=list)
    arrivals: list[tuple[Action, int]] = field(default_factory=list)
    peak_in_flight: dict[int, int] = field(default_factory=dict)
