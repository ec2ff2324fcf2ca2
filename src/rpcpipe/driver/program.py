"""2D: every worker of the schedule in R copies, each with its share of the batch.

Nothing else of rpcpipe knows more of it than names: a replica executes the same schedule on workers of its
own, and its micro-batches have the numbers that they have in the whole batch. So ports, random
numbers, losses, spans and messages need no second index, and the oracle is a plain loop over all
micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from rpcpipe.driver.routes import compile_routes
from rpcpipe.model.microbatch import Nest, batch_size, split
from rpcpipe.model.wiring import Hop
from rpcpipe.schedules import Schedule, forward_only
from rpcpipe.worker import gradient_exchange
from rpcpipe.worker.messages import Call, Task


@dataclass(frozen=True)
class Layout:
    """The workers ``names`` of a pipeline with ``replicas``: the schedule's worker w is names w·R … w·R + R - 1."""

    names: tuple[str, ...]
    replicas: int = 1

    @property
    def width(self) -> int:
        """The schedule's workers."""
        return len(self.names) // self.replicas

    def column(self, worker: int) -> tuple[str, ...]:
        """The copies of the schedule's ``worker``."""
        return self.names[worker * self.replicas : (worker + 1) * self.replicas]

    def row(self, replica: int) -> tuple[str, ...]:
        """The schedule's workers in one replica."""
        return self.names[replica :: self.replicas]

    def index(self, name: str) -> tuple[int, int]:
        """(the schedule's worker, replica) that ``name`` is."""
        return divmod(self.names.index(name), self.replicas)

    def replica_of(self, name: str) -> int | None:
        """The replica that ``name`` is part of, None where there is one or ``name`` is not used."""
        return self.index(name)[1] if self.replicas > 1 and name in self.names else None

    def cut(self, nest: Nest, chunks: int) -> list[list[Nest]]:
        """By replica the micro-batches of its share: ``chunk(replicas)``, and ``chunk(chunks)`` of each.

        A batch smaller than that makes fewer, for the last replicas none.
        """
        shares = [split(share, chunks) for share in split(nest, self.replicas)]
        return [*shares, *([] for _ in range(self.replicas - len(shares)))]


class Batch(NamedTuple):
    """A batch's micro-batches in order, the share of the batch that each is, and how many each replica has."""

    parts: list[Nest]
    weights: tuple[float, ...]
    counts: tuple[int, ...]


class Group(NamedTuple):
    """Workers that sum gradients over their copies of the same parameters.

    ``stages``: those whose backwards make the gradients, ``owners``: of the buckets. ``buffered``: the one
    stage has buffers, which are to be the same on all members.
    """

    name: str
    members: tuple[str, ...]
    stages: tuple[int, ...]
    owners: Sequence[int]
    buffered: bool = False


class Program:
    """The calls of a pipeline's steps, for batches of any size.

    ``hops``: the ways of named values. ``groups``: who exchanges gradients. ``shard``: optimizers have only what
    they own.
    """

    def __init__(
        self,
        schedule: Schedule,
        layout: Layout,
        hops: Sequence[Hop],
        groups: Sequence[Group],
        *,
        shard: bool,
    ) -> None:
        self._schedule, self._layout, self._hops = schedule, layout, hops
        self._groups, self._shard = groups, shard
        self._made: dict[tuple[Any, ...], list[Call]] = {}

    def cut(self, inputs: Nest) -> Batch:
        """``inputs`` in micro-batches."""
        shares = self._layout.cut(inputs, self._schedule.chunks)
        parts, total = list(chain.from_iterable(shares)), batch_size(inputs)
        return Batch(parts, tuple(batch_size(part) / total for part in parts), tuple(map(len, shares)))

    def cut_targets(self, targets: Nest) -> list[Nest]:
        """Their targets."""
        return list(chain.from_iterable(self._layout.cut(targets, self._schedule.chunks)))

    def train(self, counts: tuple[int, ...], *, updates: bool) -> list[Call]:
        """Forward and backward where replica r has ``counts[r]`` micro-batches, and the sums over the replicas.

        Gradients are pushed after a stage's last backward, so that the backwards of other stages and replicas
        hide it. ``updates``: an update follows.
        """
        spread = updates and not self._shard
        if (counts, spread) not in self._made:
            rows = self._rows(self._schedule, counts, targets=True)
            ends = [self._sums(replica, row, spread) for replica, row in enumerate(rows)]
            self._made[counts, spread] = _in_turns(rows) + _in_turns(ends)
        return self._made[counts, spread]

    def forward(self, counts: tuple[int, ...], *, targets: bool) -> list[Call]:
        """Forward only; ``targets``: with the loss."""
        key = ("forward", counts, targets)
        if key not in self._made:
            schedule = forward_only(self._schedule, max(counts))
            self._made[key] = _in_turns(self._rows(schedule, counts, targets=targets))
        return self._made[key]

    def after_update(self) -> dict[str, list[Task]]:
        """Where optimizers are sharded, what each worker does after its own to get the others' weights."""
        found: dict[str, list[Task]] = {}
        for group in self._groups if self._shard else ():
            for at, worker in enumerate(group.members):
                found.setdefault(worker, []).extend(gradient_exchange.gathers(group.name, group.owners, at, "weights"))
        return {worker: [*tasks, Task("updated")] for worker, tasks in found.items()}

    def _rows(self, schedule: Schedule, counts: Sequence[int], *, targets: bool) -> list[list[Call]]:
        """Every replica's actions."""
        rows = []
        for replica, count in enumerate(counts):
            mine = schedule.truncated(count, sum(counts[:replica]))
            routes = compile_routes(mine, self._layout.row(replica), targets=targets, hops=self._hops)
            rows.append([(worker, [Task("act", (route,), route.awaits)]) for worker, route in routes])
        return rows

    def _sums(self, replica: int, calls: list[Call], spread: bool) -> list[Call]:
        """Adds the pushes to a replica's ``calls``; what its workers do after all of those."""
        last = {
            tasks[0].args[0].action.stage: at
            for at, (_, tasks) in enumerate(calls)
            if tasks[0].args[0].action.kind in "BW"
        }
        ends = []
        for worker in self._layout.row(replica):
            end: list[Task] = []
            groups = [(group, group.members.index(worker)) for group in self._groups if worker in group.members]
            for group, _ in groups:
                complete = [last[stage] for stage in group.stages if stage in last and calls[last[stage]][0] == worker]
                (calls[max(complete)][1] if complete else end).append(gradient_exchange.scatter(group.name))
            for group, at in groups:
                end += gradient_exchange.reduces(group.name, group.members, group.owners, at, spread=spread)
            for group, at in groups if spread else ():
                end += gradient_exchange.gathers(group.name, group.owners, at, "sums")
            for group, at in groups:
                end += gradient_exchange.follow(group.stages[0], group.members, at) if group.buffered else []
            if end:
                ends.append((worker, end))
        return ends


def _in_turns(rows: Sequence[list[Call]]) -> list[Call]:
    """One call of each row after the other, so that all replicas begin at once."""
    return [call for turn in zip_longest(*rows) for call in turn if call is not None]
