"""Which worker holds what: the workers of a pipeline, its replicas, and the layers of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rpcpipe.schedules import Schedule


@dataclass(frozen=True)
class Layout:
    """The workers ``names`` of a pipeline with ``replicas``: the schedule's worker w is names w·R … w·R + R - 1."""

    names: tuple[str, ...]
    replicas: int = 1

    @property
    def pipeline_size(self) -> int:
        """The schedule's workers."""
        return len(self.names) // self.replicas

    def replicas_of(self, worker: int) -> tuple[str, ...]:
        """The copies of the schedule's ``worker``."""
        return self.names[worker * self.replicas : (worker + 1) * self.replicas]

    def pipeline_of(self, replica: int) -> tuple[str, ...]:
        """The schedule's workers in one replica."""
        return self.names[replica :: self.replicas]

    def index(self, name: str) -> tuple[int, int]:
        """(the schedule's worker, replica) that ``name`` is."""
        return divmod(self.names.index(name), self.replicas)

    def replica_of(self, name: str) -> int | None:
        """The replica that ``name`` is part of, None where there is one or ``name`` is not used."""
        return self.index(name)[1] if self.replicas > 1 and name in self.names else None


def stage_parts(layers: Sequence[str], sizes: Sequence[int]) -> dict[int, tuple[list[str], int]]:
    """By stage: its layers' names and the index of the first."""
    parts, first = {}, 0
    for stage, size in enumerate(sizes):
        parts[stage] = (list(layers[first : first + size]), first)
        first += size
    return parts


def owners(layers: Sequence[str], sizes: Sequence[int], schedule: Schedule, workers: Sequence[str]) -> dict[str, str]:
    """The worker of every layer."""
    return {
        name: workers[schedule.placement[stage]]
        for stage, (names, _) in stage_parts(layers, sizes).items()
        for name in names
    }
