"""The calls of a step: every action of the schedule, addressed to its worker, and the exchange of gradients.

Routes are derived from ``Schedule.upstream`` and its inverse, so dependencies are stated in one place only. Named
values add ports and no dependency between actions: their routes lead from a stage to a later one, whose forward
follows that of the earlier stage anyway, and the backwards follow each other in reverse.

Every replica runs the same schedule on separate workers; micro-batches are numbered across the whole batch, so no
message, random number, loss or span needs a replica index, and the oracle is a plain loop over all micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

from rpcpipe.driver.batch import entering
from rpcpipe.driver.layout import Layout
from rpcpipe.driver.remote_batches import RemoteBatches, RemoteValue
from rpcpipe.errors import require
from rpcpipe.model.batch import Batch, cut_inputs, cut_targets
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
    Reduce,
    ReduceScatter,
    RunAction,
    TakeBuffers,
    Task,
)


class Fed(NamedTuple):
    """A micro-batch that enters a stream: its context for the stages, its inputs and its targets."""

    share: MicroBatch
    part: Nest
    target: Nest


class Group(NamedTuple):
    """Workers that sum gradients over their copies of the same parameters.

    ``stages``: the stages whose backwards make the gradients. ``owners``: by bucket, the member that sums it.
    ``buffered``: the group's only stage has buffers, which must be equal on all members.
    """

    name: str
    members: tuple[str, ...]
    stages: tuple[int, ...]
    owners: Sequence[int]
    buffered: bool = False


@dataclass(eq=False)
class Program:
    """The calls of a step, in the order in which they are issued."""

    calls: Sequence[Call]

    @cached_property
    def tasks(self) -> dict[str, list[Task]]:
        """Each worker's tasks in their order."""
        by_worker: dict[str, list[Task]] = {}
        for worker, tasks in self.calls:
            by_worker.setdefault(worker, []).extend(tasks)
        return by_worker

    @cached_property
    def _takers(self) -> dict[Port, str]:
        return {port: worker for worker, tasks in self.calls for task in tasks for port in task.awaits}

    def values_for(self, values: Mapping[Port, Any]) -> dict[str, list[tuple[Port, Any]]]:
        """Return by worker those of ``values`` that its tasks await."""
        by_worker: dict[str, list[tuple[Port, Any]]] = {}
        for port, value in values.items():
            if port in self._takers:
                by_worker.setdefault(self._takers[port], []).append((port, value))
        return by_worker


class StepProgram:
    """Makes the calls of a pipeline's steps, for batches of any size.

    ``value_routes``: the routes of named values. ``groups``: the groups that exchange gradients. ``shard``: whether
    each optimizer holds only the parameters that its worker owns.
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
        self._made: dict[tuple[Any, ...], Program] = {}

    @property
    def exchanges(self) -> bool:
        """Whether workers exchange gradients."""
        return bool(self._groups)

    def cut(self, inputs: Nest) -> Batch:
        """Cut ``inputs`` into micro-batches; raises ArgumentError for what cannot be cut or sent."""
        require(
            not isinstance(inputs, RemoteBatches | RemoteValue),
            "this call needs tensors, and the batches of rp.RemoteBatches are on the workers; pass those of"
            " next(iter(make())), and to train_step one batch as *batches.batch(n)",
        )
        return cut_inputs(inputs, self._layout.replicas, self._schedule.chunks)

    def cut_targets(self, targets: Nest, inputs: Batch) -> list[Nest]:
        """Cut ``targets`` as ``cut`` does the inputs, detached; raises ArgumentError unless their numbers agree."""
        return cut_targets(targets, inputs, self._layout.replicas, self._schedule.chunks)

    def given(self, inputs: list[Nest], targets: list[Nest] | None) -> dict[Port, Any]:
        """Return the micro-batches' inputs and targets by the port that awaits them."""
        values = {
            port: value
            for chunk, part in enumerate(inputs)
            for port, value in entering(part, chunk, self._value_routes).items()
        }
        if targets is not None:
            last = self._schedule.stages - 1
            values |= {Port(Action("F", last, chunk), "target"): part for chunk, part in enumerate(targets)}
        return values

    def train(self, counts: tuple[int, ...], *, updates: bool) -> Program:
        """Return the calls of a training step in which replica r has ``counts[r]`` micro-batches.

        They end with the sums over the replicas. Gradients are pushed right after a stage's last backward, so that
        the push overlaps with other stages' and replicas' backwards. ``updates``: an update follows.
        """
        spread = updates and not self._shard
        if (counts, spread) not in self._made:
            rows = self._rows(self._schedule, counts, targets=True)
            ends = [self._sums(replica, row, spread) for replica, row in enumerate(rows)]
            calls = _in_turns([self._with_pushes(row) for row in rows]) + _in_turns(ends)
            self._made[counts, spread] = Program(calls)
        return self._made[counts, spread]

    def forward(self, counts: tuple[int, ...], *, targets: bool) -> Program:
        """Return the calls of a forward pass; ``targets``: the last stage computes the loss."""
        key = ("forward", counts, targets)
        if key not in self._made:
            schedule = forward_only(self._schedule, max(counts))
            self._made[key] = Program(_in_turns(self._rows(schedule, counts, targets=targets)))
        return self._made[key]

    def stream(
        self,
        actions: Sequence[tuple[int, Action]],
        groups: Sequence[int],
        fed: Fed | None,
        update: Callable[[int], Update],
    ) -> list[tuple[str, Task, list[tuple[Port, Any]]]]:
        """Return (worker, task, the driver's values for it) for each (worker, action) of a stream.

        ``groups``: by micro-batch, the update that it belongs to. ``fed``: the micro-batch of the forwards.
        ``update``: returns the context of a group's update.
        """
        names, calls = self._layout.names, []
        for worker, action in actions:
            group = groups[action.chunk]
            action_route = route(self._schedule, action, names, targets=True, value_routes=self._value_routes)
            values: list[tuple[Port, Any]] = []
            context: MicroBatch | Update | None = None
            if action.kind == "F":
                assert fed is not None
                context = fed.share
                inputs = entering(fed.part, action.chunk, self._value_routes)
                values += [(port, inputs[port]) for port in action_route.awaits if port in inputs]
                values += [(Port(action, "target"), fed.target)] if worker == len(names) - 1 else []
            elif action.kind == "U":
                context = update(group)
            task = Task(RunAction(action_route, context), action_route.awaits, group)
            calls.append((names[worker], task, values))
        return calls

    def after_update(self) -> dict[str, list[Task]]:
        """Return the tasks by which each worker receives the others' weights after its update; {} unless sharded."""
        gathers: dict[str, list[Task]] = {}
        for group in self._groups if self._shard else ():
            for index, worker in enumerate(group.members):
                gathers.setdefault(worker, []).extend(gather_weights(group.name, group.owners, index))
        return gathers

    def _rows(self, schedule: Schedule, counts: Sequence[int], *, targets: bool) -> list[list[Call]]:
        """Return every replica's calls, one per action."""
        rows = []
        for replica, count in enumerate(counts):
            routes = compile_routes(
                schedule.truncated(count, sum(counts[:replica])),
                self._layout.pipeline_of(replica),
                targets=targets,
                value_routes=self._value_routes,
            )
            rows.append([(worker, [Task(RunAction(route), route.awaits)]) for worker, route in routes])
        return rows

    def _with_pushes(self, calls: list[Call]) -> list[Call]:
        """Return one replica's ``calls`` with a push of each group's gradients after the last backward for them."""
        pushes: dict[int, list[Task]] = {}
        last = _last_backwards(calls)
        for worker in dict.fromkeys(worker for worker, _ in calls):
            for group in self._groups_of(worker):
                if (index := _complete_at(group, worker, calls, last)) is not None:
                    pushes.setdefault(index, []).append(reduce_scatter(group.name))
        return [(worker, tasks + pushes.get(index, [])) for index, (worker, tasks) in enumerate(calls)]

    def _sums(self, replica: int, calls: list[Call], spread: bool) -> list[Call]:
        """Return the calls to a replica's workers that follow all of its ``calls``.

        push ─▶ sum the owned buckets ─▶ take the other sums (or, sharded, the weights after the update) ─▶ buffers
        """
        ends, last = [], _last_backwards(calls)
        for worker in self._layout.pipeline_of(replica):
            groups = self._groups_of(worker)
            members = [group.members.index(worker) for group in groups]
            # A worker without any backward for a group pushes, too: the other members await its part.
            idle = [group for group in groups if _complete_at(group, worker, calls, last) is None]
            end = [reduce_scatter(group.name) for group in idle]
            for group, index in zip(groups, members, strict=True):
                end += reduces(group.name, group.members, group.owners, index, spread=spread)
            for group, index in zip(groups, members, strict=True):
                end += gather_sums(group.name, group.owners, index) if spread else []
            for group, index in zip(groups, members, strict=True):
                end += follow(group.stages[0], group.members, index) if group.buffered else []
            ends += [(worker, end)] if end else []
        return ends

    def _groups_of(self, worker: str) -> list[Group]:
        return [group for group in self._groups if worker in group.members]


def _last_backwards(calls: Sequence[Call]) -> dict[int, int]:
    """Return, by stage, the index in ``calls`` of the last action that adds to its parameters' gradients."""
    return {
        task.operation.route.action.stage: index
        for index, (_, [task, *_]) in enumerate(calls)
        if isinstance(task.operation, RunAction) and task.operation.route.action.kind in "BW"
    }


def _complete_at(group: Group, worker: str, calls: Sequence[Call], last: Mapping[int, int]) -> int | None:
    """Return the index in ``calls`` of the last backward for the group's gradients on ``worker``; None without any."""
    return max(
        (last[stage] for stage in group.stages if stage in last and calls[last[stage]][0] == worker), default=None
    )


def _in_turns(rows: Sequence[list[Call]]) -> list[Call]:
    """Return the calls of ``rows`` in turns, one of each row, so that all replicas begin at once."""
    return [call for turn in zip_longest(*rows) for call in turn if call is not None]


def compile_routes(
    schedule: Schedule, workers: Sequence[str], *, targets: bool, value_routes: Sequence[ValueRoute] = ()
) -> list[tuple[str, Route]]:
    """Return (worker, route) for every action, in an order in which the actions could run one by one.

    ``targets``: the last stage awaits the targets, too. ``value_routes``: the routes of named values.
    """
    return [
        (workers[index], route(schedule, action, workers, targets, value_routes))
        for index, action, _ in schedule.walk()
    ]


def route(
    schedule: Schedule, action: Action, workers: Sequence[str], targets: bool, value_routes: Sequence[ValueRoute] = ()
) -> Route:
    """Return the route of ``action``: the ports that it awaits, and the destinations of its results."""
    kind, stage, chunk = action
    # A named value travels between neighbouring stages with the running value, so it needs no other link there.
    before = {values.source for values in value_routes if values.target == stage and values.source != stage - 1}
    behind = {values.target for values in value_routes if values.source == stage and values.target != stage + 1}
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
    """Return the task that pushes a member's complete gradients to their owners."""
    return Task(ReduceScatter(group))


def reduces(group: str, workers: Sequence[str], owners: Sequence[int], index: int, *, spread: bool) -> list[Task]:
    """Return member ``index``'s tasks that sum the buckets that it owns.

    ``owners``: by bucket, the owner. ``spread``: the sums are pushed, so the other members need ``gather_sums``.
    """
    slots = [gradients_from(worker) for member, worker in enumerate(workers) if member != index]
    return [
        Task(Reduce(group, bucket, spread), tuple(Port(Bucket(group, bucket), slot) for slot in slots))
        for bucket, owner in enumerate(owners)
        if owner == index
    ]


def gather_sums(group: str, owners: Sequence[int], index: int) -> list[Task]:
    """Return member ``index``'s tasks that receive the sums of the buckets that other members own."""
    return [
        Task(GatherSums(group, bucket), (Port(Bucket(group, bucket), "sums"),))
        for bucket, owner in enumerate(owners)
        if owner != index
    ]


def gather_weights(group: str, owners: Sequence[int], index: int) -> list[Task]:
    """Return member ``index``'s tasks that receive the weights of the buckets that other members own."""
    return [
        Task(GatherWeights(group, bucket), (Port(Bucket(group, bucket), "weights"),))
        for bucket, owner in enumerate(owners)
        if owner != index
    ]


def follow(stage: int, workers: Sequence[str], index: int) -> list[Task]:
    """Return replica ``index``'s tasks that make a stage's buffers equal on all replicas.

    The first replica adds up the running statistics; the other replicas receive its buffers.
    """
    bucket = Bucket(group_of(stage), 0)
    if index:
        return [Task(GiveStatistics(stage)), Task(TakeBuffers(stage), (Port(bucket, "buffers"),))]
    return [Task(AddStatistics(stage), tuple(Port(bucket, statistics_from(worker)) for worker in workers[1:]))]
