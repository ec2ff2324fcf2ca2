"""A step's calls: every action of the schedule addressed to its worker, and the exchange of gradients behind it.

Derived from ``Schedule.upstream`` and its inverse, so the rule of what waits for what stays in one
place. Named values add ports and no dependency: their routes lead from stage to later stage, and there
the running value's forward, and back the gradient's backward, has gone before them stage by stage.

A replica executes the same schedule on workers of its own. Micro-batches are numbered across the whole batch, so
no message, random number, loss or span needs a replica index, and the oracle is a plain loop over all micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from rpcpipe.driver.batch import Batch, cut_inputs, cut_targets, entering
from rpcpipe.driver.layout import Layout
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.wiring import DRIVER, ValueRoute, link
from rpcpipe.schedules import Action, Schedule, forward_only
from rpcpipe.stage.context import MicroBatch
from rpcpipe.worker.gradient_exchange import gradients_from, group_of, statistics_from
from rpcpipe.worker.messages import Bucket, Port, Route, Send, Update
from rpcpipe.worker.operations import (
    AddStatistics,
    Call,
    GatherSums,
    GatherWeights,
    GiveStatistics,
    LastUpdate,
    Reduce,
    ReduceScatter,
    RunAction,
    TakeBuffers,
    Task,
)


class Fed(NamedTuple):
    """A micro-batch that enters a stream: what stages are told of it, its inputs and its targets."""

    share: MicroBatch
    part: Nest
    target: Nest


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


class StepProgram:
    """The calls of a pipeline's steps, for batches of any size.

    ``value_routes``: the ways of named values. ``groups``: who exchanges gradients. ``shard``: optimizers have only
    what they own.
    """

    def __init__(
        self,
        schedule: Schedule,
        layout: Layout,
        value_routes: Sequence[ValueRoute],
        groups: Sequence[Group],
        *,
        shard: bool,
    ) -> None:
        self._schedule, self._layout, self._value_routes = schedule, layout, value_routes
        self._groups, self._shard = groups, shard
        self._made: dict[tuple[Any, ...], list[Call]] = {}

    def cut(self, inputs: Nest) -> Batch:
        """``inputs`` in micro-batches; ArgumentError for what cannot be cut or sent."""
        return cut_inputs(inputs, self._layout.replicas, self._schedule.chunks)

    def cut_targets(self, targets: Nest, inputs: Batch) -> list[Nest]:
        """Their targets, detached; ArgumentError unless they make as many micro-batches."""
        return cut_targets(targets, inputs, self._layout.replicas, self._schedule.chunks)

    def given(self, inputs: list[Nest], targets: list[Nest] | None) -> dict[Port, Any]:
        """The driver's inputs and targets by the port that awaits them."""
        values = {
            port: value
            for chunk, part in enumerate(inputs)
            for port, value in entering(part, chunk, self._value_routes).items()
        }
        if targets is not None:
            last = self._schedule.stages - 1
            values |= {Port(Action("F", last, chunk), "target"): part for chunk, part in enumerate(targets)}
        return values

    def train(self, counts: tuple[int, ...], *, updates: bool) -> list[Call]:
        """Forward and backward where replica r has ``counts[r]`` micro-batches, and the sums over the replicas.

        Gradients are pushed after a stage's last backward, so that the backwards of other stages and replicas
        hide it. ``updates``: an update follows.
        """
        spread = updates and not self._shard
        if (counts, spread) not in self._made:
            rows = self._rows(self._schedule, counts, targets=True)
            ends = [self._sums(replica, row, spread) for replica, row in enumerate(rows)]
            self._made[counts, spread] = _in_turns([self._with_pushes(row) for row in rows]) + _in_turns(ends)
        return self._made[counts, spread]

    def forward(self, counts: tuple[int, ...], *, targets: bool) -> list[Call]:
        """Forward only; ``targets``: with the loss."""
        key = ("forward", counts, targets)
        if key not in self._made:
            schedule = forward_only(self._schedule, max(counts))
            self._made[key] = _in_turns(self._rows(schedule, counts, targets=targets))
        return self._made[key]

    def stream(
        self,
        actions: Sequence[tuple[int, Action]],
        groups: Sequence[int],
        fed: Fed | None,
        update: Callable[[int], Update],
    ) -> list[tuple[str, Task, list[tuple[Port, Any]]]]:
        """(worker, task, the driver's values for it) for each (worker, action) of a stream.

        ``groups``: by micro-batch, the update that it belongs to. Forwards are of the micro-batch ``fed``.
        """
        names, calls = self._layout.names, []
        for worker, action in actions:
            group = groups[action.chunk]
            way = route(self._schedule, action, names, targets=True, value_routes=self._value_routes)
            values: list[tuple[Port, Any]] = []
            context: MicroBatch | Update | None = None
            if action.kind == "F":
                assert fed is not None
                context = fed.share
                given = entering(fed.part, action.chunk, self._value_routes)
                values += [(port, given[port]) for port in way.awaits if port in given]
                values += [(Port(action, "target"), fed.target)] if worker == len(names) - 1 else []
            elif action.kind == "U":
                context = update(group)
            calls.append((names[worker], Task(RunAction(way, context), way.awaits, group), values))
        return calls

    def after_update(self) -> dict[str, list[Task]]:
        """Where optimizers are sharded, what each worker does after its own to get the others' weights."""
        found: dict[str, list[Task]] = {}
        for group in self._groups if self._shard else ():
            for at, worker in enumerate(group.members):
                found.setdefault(worker, []).extend(gather_weights(group.name, group.owners, at))
        return {worker: [*tasks, Task(LastUpdate())] for worker, tasks in found.items()}

    def _rows(self, schedule: Schedule, counts: Sequence[int], *, targets: bool) -> list[list[Call]]:
        """Every replica's actions."""
        rows = []
        for replica, count in enumerate(counts):
            mine = schedule.truncated(count, sum(counts[:replica]))
            routes = compile_routes(
                mine, self._layout.pipeline_of(replica), targets=targets, value_routes=self._value_routes
            )
            rows.append([(worker, [Task(RunAction(route), route.awaits)]) for worker, route in routes])
        return rows

    def _with_pushes(self, calls: list[Call]) -> list[Call]:
        """``calls`` of one replica, each group's gradients pushed behind the last backward that adds to them."""
        pushes: dict[int, list[Task]] = {}
        last = _last_backwards(calls)
        for worker in dict.fromkeys(worker for worker, _ in calls):
            for group in self._groups_of(worker):
                if (at := _complete_at(group, worker, calls, last)) is not None:
                    pushes.setdefault(at, []).append(reduce_scatter(group.name))
        return [(worker, tasks + pushes.get(at, [])) for at, (worker, tasks) in enumerate(calls)]

    def _sums(self, replica: int, calls: list[Call], spread: bool) -> list[Call]:
        """What each worker of a replica does after all of its ``calls``.

        push ─▶ sum what one owns ─▶ take the other sums (or, sharded, the weights after the update) ─▶ buffers
        """
        ends, last = [], _last_backwards(calls)
        for worker in self._layout.pipeline_of(replica):
            groups = self._groups_of(worker)
            places = [group.members.index(worker) for group in groups]
            idle = [group for group in groups if _complete_at(group, worker, calls, last) is None]
            end = [reduce_scatter(group.name) for group in idle]  # no backward here: what the others await all the same
            for group, at in zip(groups, places, strict=True):
                end += reduces(group.name, group.members, group.owners, at, spread=spread)
            for group, at in zip(groups, places, strict=True):
                end += gather_sums(group.name, group.owners, at) if spread else []
            for group, at in zip(groups, places, strict=True):
                end += follow(group.stages[0], group.members, at) if group.buffered else []
            ends += [(worker, end)] if end else []
        return ends

    def _groups_of(self, worker: str) -> list[Group]:
        return [group for group in self._groups if worker in group.members]


def _last_backwards(calls: Sequence[Call]) -> dict[int, int]:
    """By stage, where in ``calls`` its parameters' gradients grow last."""
    return {
        task.operation.route.action.stage: at
        for at, (_, [task, *_]) in enumerate(calls)
        if isinstance(task.operation, RunAction) and task.operation.route.action.kind in "BW"
    }


def _complete_at(group: Group, worker: str, calls: Sequence[Call], last: Mapping[int, int]) -> int | None:
    """Where in ``calls`` the group's gradients on ``worker`` are complete; None if nothing adds to them there."""
    return max(
        (last[stage] for stage in group.stages if stage in last and calls[last[stage]][0] == worker), default=None
    )


def _in_turns(rows: Sequence[list[Call]]) -> list[Call]:
    """One call of each row after the other, so that all replicas begin at once."""
    return [call for turn in zip_longest(*rows) for call in turn if call is not None]


def compile_routes(
    schedule: Schedule, workers: Sequence[str], *, targets: bool, value_routes: Sequence[ValueRoute] = ()
) -> list[tuple[str, Route]]:
    """(worker, route) for every action, in an order in which everything could run one by one.

    ``targets``: the last stage awaits the targets as well. ``value_routes``: the ways of named values.
    """
    return [(workers[at], route(schedule, action, workers, targets, value_routes)) for at, action, _ in schedule.walk()]


def route(
    schedule: Schedule, action: Action, workers: Sequence[str], targets: bool, value_routes: Sequence[ValueRoute] = ()
) -> Route:
    """What ``action`` awaits and where its results go."""
    kind, stage, chunk = action
    before = {way.source for way in value_routes if way.target == stage and way.source != stage - 1}
    behind = {way.target for way in value_routes if way.source == stage and way.target != stage + 1}
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


# --- the exchange of gradients: a group member's tasks ---


def reduce_scatter(group: str) -> Task:
    """Every member's, once its gradients are complete."""
    return Task(ReduceScatter(group))


def reduces(group: str, workers: Sequence[str], owners: Sequence[int], index: int, *, spread: bool) -> list[Task]:
    """Member ``index``'s, for the buckets it owns; ``owners``: of all. ``spread``: ``gather_sums`` follow."""
    slots = [gradients_from(worker) for at, worker in enumerate(workers) if at != index]
    return [
        Task(Reduce(group, bucket, spread), tuple(Port(Bucket(group, bucket), slot) for slot in slots))
        for bucket, owner in enumerate(owners)
        if owner == index
    ]


def gather_sums(group: str, owners: Sequence[int], index: int) -> list[Task]:
    """Member ``index``'s, for the buckets whose gradients others sum."""
    return [
        Task(GatherSums(group, bucket), (Port(Bucket(group, bucket), "sums"),))
        for bucket, owner in enumerate(owners)
        if owner != index
    ]


def gather_weights(group: str, owners: Sequence[int], index: int) -> list[Task]:
    """Member ``index``'s, for the buckets whose parameters others update."""
    return [
        Task(GatherWeights(group, bucket), (Port(Bucket(group, bucket), "weights"),))
        for bucket, owner in enumerate(owners)
        if owner != index
    ]


def follow(stage: int, workers: Sequence[str], index: int) -> list[Task]:
    """Replica ``index``'s, for a stage with buffers: all take over the first one's, which adds up statistics."""
    about = Bucket(group_of(stage), 0)
    if index:
        return [Task(GiveStatistics(stage)), Task(TakeBuffers(stage), (Port(about, "buffers"),))]
    return [Task(AddStatistics(stage), tuple(Port(about, statistics_from(worker)) for worker in workers[1:]))]
