"""What travels between the driver and the workers: plain named tuples, cheap to pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rpcpipe.model.microbatch import Packed
from rpcpipe.schedules import Action
from rpcpipe.stage.metrics import Sums


class Bucket(NamedTuple):
    """Some parameters of a group whose members exchange gradients or weights."""

    group: str
    number: int

    def describe(self) -> str:
        """For a message: ``bucket 1 of stage 0``."""
        return f"bucket {self.number} of {self.group}"


class Port(NamedTuple):
    """One of the values an action waits for, or a task of ``exchange``.

    ``slot`` is "input", "target", "inputs" (named ones, from the driver) or "value of stage …"; of a bucket
    "gradients from …", "sums" or "weights".
    """

    action: Action | Bucket
    slot: str


class Send(NamedTuple):
    """Where a stage's result for ``link``, its connection with another stage, goes."""

    link: str
    worker: str
    port: Port


class Route(NamedTuple):
    """An action, what it waits for from elsewhere, and where its results go."""

    action: Action
    awaits: tuple[Port, ...]
    sends: tuple[Send, ...]


class Update(NamedTuple):
    """An update in a stream: the hyperparameters set on the driver, and what to clip to.

    All stages have done the updates before ``committed``.
    """

    group: int
    changes: Sequence[Mapping[str, Any]]
    clip: float | None
    committed: int


@dataclass
class Report:
    """One worker's account of a step, or in a stream of what it did since its last update.

    ``losses`` holds (value, count) per micro-batch on the last stage, count None for a mean, and
    ``metrics`` what ``evaluate`` measures there beside it; ``input_grads`` the gradients of what came from the driver,
    by (stage, micro-batch);
    ``norms`` the 2-norm of every gradient summed here, by stage and the parameter's place in it;
    ``spans`` holds (kind, stage, chunk, start, end, version) in nanoseconds of the worker's monotonic
    clock, version -1 where weights have only one.
    Where the step is traced, ``sends`` holds (producer, port, time) and ``arrivals`` (port, time) of the
    values that other workers got from or gave to this one.
    """

    worker: str
    losses: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    outputs: dict[int, Packed] = field(default_factory=dict)
    metrics: dict[int, Sums] = field(default_factory=dict)
    input_grads: dict[tuple[int, int], list[torch.Tensor | None]] = field(default_factory=dict)
    norms: dict[int, dict[int, float]] = field(default_factory=dict)
    spans: list[tuple[str, int, int, int, int, int]] = field(default_factory=list)
    sends: list[tuple[Action, Port, int]] = field(default_factory=list)
    arrivals: list[tuple[Port, int]] = field(default_factory=list)
    peak_in_flight: dict[int, int] = field(default_factory=dict)
    peak_bytes: dict[int, int] = field(default_factory=dict)
    recomputed: dict[int, int] = field(default_factory=dict)
    versions: dict[int, tuple[int, int]] = field(default_factory=dict)  # most at once, bytes of one
    skipped: bool = False

    @classmethod
    def joined(cls, reports: Sequence[Report]) -> Report:
        """What one worker did in all of ``reports``; peaks are those of the last."""
        last = reports[-1]
        joined = cls(
            last.worker, peak_in_flight=last.peak_in_flight, versions=last.versions, peak_bytes=last.peak_bytes,
            recomputed=last.recomputed,
        )  # fmt: skip
        for report in reports:
            joined.losses |= report.losses
            joined.spans += report.spans
            joined.sends += report.sends
            joined.arrivals += report.arrivals
        return joined


@dataclass(frozen=True)
class StageInfo:
    """What a worker says of a stage that it holds.

    ``sizes``: parameters by layer. ``trainable``: names of those that require gradients. ``bytes``: of all parameters.
    ``groups``: the optimizer's hyperparameters by group. ``wired``: do its layers take or give named values?
    ``sharded``: is its optimizer? ``buckets``: by bucket of gradients, the replica that sums it.
    """

    layers: list[str]
    sizes: dict[str, int]
    trainable: list[str]
    parameters: int
    bytes: int
    buffered: bool
    device: str
    groups: list[dict[str, Any]]
    wired: bool
    sharded: bool
    buckets: list[int]
