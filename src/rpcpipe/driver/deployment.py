"""The deployment of a model: which worker holds which layers, and the resulting routes between stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rpcpipe.driver.layout import Layout, owners, stage_parts
from rpcpipe.driver.program import Group, StepProgram
from rpcpipe.driver.stage_handle import StageHandle
from rpcpipe.model import wiring
from rpcpipe.model.tied_weights import Tie
from rpcpipe.model.wiring import StageLinks, ValueRoute, Wiring
from rpcpipe.schedules import Schedule
from rpcpipe.worker.gradient_exchange import group_of


@dataclass(frozen=True)
class Deployment:
    """The model's layers, cut by ``balance`` (layers per stage), on the workers where ``schedule`` places the stages.

    ``wirings``: by layer, the named values that it takes and gives. ``ties``: the weights that layers share.
    ``shard``: every replica's optimizer holds only its share of the parameters.
    """

    layout: Layout
    schedule: Schedule
    balance: Sequence[int]
    wirings: Mapping[str, Wiring]
    ties: tuple[Tie, ...]
    shard: bool

    @property
    def layers(self) -> list[str]:
        """The layers' names in the model's order."""
        return list(self.wirings)

    @property
    def parts(self) -> dict[int, tuple[list[str], int]]:
        """By stage: its layers' names and the first layer's index in the model."""
        return stage_parts(self.layers, self.balance)

    @cached_property
    def value_routes(self) -> tuple[ValueRoute, ...]:
        """The routes of named values between the stages."""
        return wiring.value_routes(self.wirings.values(), self.balance)

    @property
    def stage_links(self) -> StageLinks:
        """The routes of named values, and the workers that share each tied weight, replicas included."""
        return StageLinks(self.value_routes, {tie.group: self._members(self._tied_stages(tie)) for tie in self.ties})

    def parts_on(self, worker: str) -> dict[int, tuple[list[str], int]]:
        """Return the ``parts`` of the stages on ``worker``."""
        holder, _ = self.layout.index(worker)
        return {stage: part for stage, part in self.parts.items() if self.schedule.placement[stage] == holder}

    def owners(self) -> list[dict[str, str]]:
        """Return, by replica, the worker of every layer."""
        rows = map(self.layout.pipeline_of, range(self.layout.replicas))
        return [owners(self.layers, self.balance, self.schedule, row) for row in rows]

    def program(self, stages: Sequence[StageHandle]) -> StepProgram:
        """Return the program of the pipeline's steps, whose workers hold ``stages``."""
        return StepProgram(self.schedule, self.layout, self.value_routes, self._groups(stages), shard=self.shard)

    def _groups(self, stages: Sequence[StageHandle]) -> list[Group]:
        """Return the groups that sum gradients: a stage's replicas, and the workers with a copy of a tied weight."""
        groups = [
            Group(group_of(stage.index), stage.workers, (stage.index,), stage.buckets, stage.buffered)
            for stage in stages
            if len(stage.workers) > 1
        ]
        trainable = {name for stage in stages for name in stage.trainable}
        for tie in self.ties:
            shared = self._tied_stages(tie)
            members = self._members(shared)
            if len(members) > 1 and tie.holders[0].name in trainable:
                groups.append(Group(tie.group, members, shared, [0]))
        return groups

    def _tied_stages(self, tie: Tie) -> tuple[int, ...]:
        """Return the stages that hold a copy of the tied weight."""
        layers = {holder.layer for holder in tie.holders}
        return tuple(stage for stage, (names, _) in self.parts.items() if layers & set(names))

    def _members(self, stages: tuple[int, ...]) -> tuple[str, ...]:
        """Return the names of all workers that hold one of ``stages``, each name once."""
        holders = dict.fromkeys(self.schedule.placement[stage] for stage in stages)
        return tuple(name for holder in holders for name in self.layout.replicas_of(holder))
