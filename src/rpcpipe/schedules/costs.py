"""How long every action and transfer takes: what the simulator computes a timeline from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rpcpipe.errors import ArgumentError
from rpcpipe.schedules.action import Action
from rpcpipe.schedules.spans import Spans

PerStage = float | Sequence[float]

_PER_STAGE = ("forward", "input_gradient", "weight_gradient", "backward", "output_bytes", "recompute_seconds")


@dataclass(frozen=True)
class Costs:
    """Durations in seconds (or any one unit), for all stages or as a sequence with one per stage.

    A whole backward takes ``backward``, by default ``input_gradient + weight_gradient``. A result
    for another worker arrives ``latency + output_bytes / bandwidth`` after it is produced, without
    occupying either worker. ``recompute_seconds`` is the forward repeated before a backward; it needs no
    gradient and may run while that is being sent. ``optimizer`` follows the last action of all workers (the
    gate), or is the duration of every update of an asynchronous schedule. Where there are fewer ``cores``
    than busy workers, these share the cores in equal parts.
    """

    forward: PerStage = 1.0
    input_gradient: PerStage = 1.0
    weight_gradient: PerStage = 1.0
    backward: PerStage | None = None
    latency: float = 0.0
    bandwidth: float = float("inf")
    output_bytes: PerStage = 0.0
    recompute_seconds: PerStage = 0.0
    optimizer: float = 0.0
    cores: float | None = None

    def check(self, stages: int) -> None:
        """Raise ScheduleError if a sequence has not one entry for each of ``stages`` stages."""
        for name in _PER_STAGE:
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(value) != stages:
                raise ArgumentError(f"costs.{name} has {len(value)} entries for {stages} stages")

    def of(self, kind: str, stage: int) -> float:
        """Return the duration of an action of ``kind`` on ``stage``, without recomputation."""
        if kind == "F":
            return _at(self.forward, stage)
        if kind == "I":
            return _at(self.input_gradient, stage)
        if kind == "W":
            return _at(self.weight_gradient, stage)
        if kind == "U":
            return self.optimizer
        if self.backward is not None:
            return _at(self.backward, stage)
        return _at(self.input_gradient, stage) + _at(self.weight_gradient, stage)

    def recomputation(self, stage: int) -> float:
        """Return the duration of the forward that is repeated before ``stage``'s backward."""
        return _at(self.recompute_seconds, stage)

    def transfer(self, producer: Action) -> float:
        """Return the time from the end of ``producer`` until its result is on another worker.

        A gradient is as large as the output of the stage before.
        """
        stage = producer.stage if producer.kind == "F" else producer.stage - 1
        return self.latency + _at(self.output_bytes, stage) / self.bandwidth

    @classmethod
    def measured(cls, timeline: Spans, stages: int) -> Costs:
        """Return the mean durations by stage in a measured timeline; transfers are free, as in the ideal."""
        durations: dict[tuple[str, int], list[float]] = {}
        for span in timeline.spans:
            durations.setdefault((span.kind, span.stage), []).append(span.end - span.start)

        def mean(kind: str) -> list[float]:
            by_stage = [durations.get((kind, stage), [0.0]) for stage in range(stages)]
            return [sum(times) / len(times) for times in by_stage]

        updates = mean("U")
        return cls(
            forward=mean("F"), input_gradient=mean("I"), weight_gradient=mean("W"), backward=mean("B"),
            optimizer=sum(updates) / len(updates),
        )  # fmt: skip


def _at(value: PerStage, stage: int) -> float:
    return value[stage] if isinstance(value, Sequence) else value
