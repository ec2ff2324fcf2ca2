"""How long every action and transfer takes: what the simulator computes a timeline from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rpcpipe._arguments import require_number
from rpcpipe.errors import ArgumentError, require_positive
from rpcpipe.schedules.action import Action
from rpcpipe.schedules.spans import Spans

PerStage = float | Sequence[float]

_PER_STAGE = (
    "forward", "input_gradient", "weight_gradient", "backward", "output_bytes", "recompute_seconds", "send_overhead",
)  # fmt: skip


_DURATIONS = ("latency", "optimizer", "action_overhead", "receive_overhead")


@dataclass(frozen=True)
class Costs:
    """Durations in seconds (or any one unit), for all stages or as a sequence with one per stage.

    A whole backward takes ``backward``, by default ``input_gradient + weight_gradient``. A result
    for another worker arrives ``latency + output_bytes / bandwidth`` after it is sent, without
    occupying either worker. ``send_overhead`` occupies the producer's worker after the action, the more
    the larger the stage's output, whose gradient costs as much; ``receive_overhead`` occupies the
    consumer's before the action that consumes the result. ``action_overhead`` occupies a worker after
    every action and what it sends. ``recompute_seconds`` is the forward repeated before a backward; it needs no
    gradient and may run while that is being sent. ``optimizer`` is the duration of a worker's update, on a core
    of its own. With ``update_alone`` it follows the worker's last action and what that sends, as where a step needs no
    norm, count or gradient of other workers; else the last action of all workers (the gate). In an asynchronous
    schedule it is the duration of every update. Where there are fewer ``cores``
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
    action_overhead: float = 0.0
    send_overhead: PerStage = 0.0
    receive_overhead: float = 0.0
    cores: float | None = None
    update_alone: bool = False

    def check(self, stages: int) -> None:
        """Raise ArgumentError for what is no duration, or no sequence of one for each of ``stages`` stages."""
        for name in _DURATIONS:
            require_number(f"costs.{name}", getattr(self, name), least=0)
        require_positive("costs.bandwidth", self.bandwidth)
        if self.cores is not None:
            require_positive("costs.cores", self.cores, ", or None for one of each worker")
        for name in _PER_STAGE:
            value = getattr(self, name)
            if name == "backward" and value is None:
                continue
            several = isinstance(value, Sequence) and not isinstance(value, str)
            for entry in value if several else (value,):
                require_number(f"costs.{name}", entry, least=0)
            if several and len(value) != stages:
                raise ArgumentError(
                    f"costs.{name} has {len(value)} entries for {stages} stages;"
                    " give one for each stage, or one number for all"
                )

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

    @property
    def transfers_cost(self) -> bool:
        """Whether a result that goes to another worker costs anything."""
        return bool(self.latency or self.output_bytes or self.send_overhead or self.receive_overhead)

    def transfer(self, producer: Action) -> float:
        """Return the time from the sending of ``producer``'s result until it is on another worker."""
        return self.latency + _at(self.output_bytes, _boundary(producer)) / self.bandwidth

    def sending(self, producer: Action) -> float:
        """Return how long ``producer``'s worker takes to send the result to another one."""
        return _at(self.send_overhead, _boundary(producer))

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


def _boundary(producer: Action) -> int:
    """Return the stage whose output ``producer``'s result is, or is the gradient of."""
    return producer.stage if producer.kind == "F" else producer.stage - 1


def _at(value: PerStage, stage: int) -> float:
    return value[stage] if isinstance(value, Sequence) else value
