"""The layout of a pipeline: its workers, its replicas, and the layers of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rpcpipe.schedules import Schedule


@dataclass(frozen=True)
class Layout:
    """The workers of a pipeline with R ``replicas``; ``names[w*R : (w+1)*R]`` are copies of the schedule's worker w."""

    names: tuple[str, ...]
    replicas: int = 1

    @property
    def pipeline_size(self) -> int:
        """The number of the schedule's workers."""
        return len(self.names) // self.replicas

    def replicas_of(self, worker: int) -> tuple[str, ...]:
        """Return the names of the copies of the schedule's ``worker``."""
        return self.names[worker * self.replicas : (worker + 1) * self.replicas]

    def pipeline_of(self, replica: int) -> tuple[str, ...]:
        """Return the names of the schedule's workers in ``replica``, in the schedule's order."""
        return self.names[replica :: self.replicas]

    def index(self, name: str) -> tuple[int, int]:
        """Return (the schedule's worker, the replica) of the worker ``name``."""
        return divmod(self.names.index(name), self.replicas)

    def replica_of(self, name: str) -> int | None:
        """Return the replica of the worker ``name``; None if the pipeline has one replica or does not use ``name``."""
        return self.index(name)[1] if self.replicas > 1 and name in self.names else None


def stage_parts(layers: Sequence[str], sizes: Sequence[int]) -> dict[int, tuple[list[str], int]]:
    """Return, by stage, its layers' names and the first layer's index; ``sizes``: layers per stage."""
    parts, first = {}, 0
    for stage, size in enumerate(sizes):
        parts[stage] = (list(layers[first : first + size]), first)
        first += size
    return parts


def owners(layers: Sequence[str], sizes: Sequence[int], schedule: Schedule, workers: Sequence[str]) -> dict[str, str]:
    """Return the worker of every layer; ``sizes``: layers per stage, ``workers``: by the schedule's worker."""
    return {
        name: workers[schedule.placement[stage]]
        for stage, (names, _) in stage_parts(layers, sizes).items()
        for name in names
    }
