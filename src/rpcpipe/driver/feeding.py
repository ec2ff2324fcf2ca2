"""What joins the stages beside the running value as the model is cut now, and what the driver gives for a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rpcpipe.driver import routes
from rpcpipe.driver.program import Group
from rpcpipe.model import wiring
from rpcpipe.model.layers import check_inputs
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.tied_weights import Tie
from rpcpipe.model.wiring import Links
from rpcpipe.pipeline.arguments import stage_parts
from rpcpipe.worker import gradient_exchange
from rpcpipe.worker.messages import Port

if TYPE_CHECKING:
    from rpcpipe.pipeline.pipeline import Pipeline


def hops(pipe: Pipeline) -> tuple[wiring.Hop, ...]:
    """The ways of named values between the stages."""
    return wiring.hops(pipe._wires.values(), pipe.balance)


def links(pipe: Pipeline) -> Links:
    """The ways of named values, and the workers that share each tied weight, replicas included."""
    return Links(hops(pipe), {tie.group: _members(pipe, tied_stages(pipe, tie)) for tie in pipe._ties})


def tied_stages(pipe: Pipeline, tie: Tie) -> tuple[int, ...]:
    """The stages that share the weight."""
    layers = {holder.layer for holder in tie.holders}
    return tuple(stage for stage, (names, _) in stage_parts(pipe._layers, pipe.balance).items() if layers & set(names))


def _members(pipe: Pipeline, stages: tuple[int, ...]) -> tuple[str, ...]:
    holders = dict.fromkeys(pipe.schedule.placement[stage] for stage in stages)
    return tuple(name for holder in holders for name in pipe._layout.column(holder))


def groups(pipe: Pipeline) -> list[Group]:
    """Who sums gradients with whom: the replicas of a stage, and all who have a copy of a tied weight."""
    found = [
        Group(gradient_exchange.group_of(stage.index), stage.workers, (stage.index,), stage.buckets, stage.buffered)
        for stage in pipe.stages
        if len(stage.workers) > 1
    ]
    trainable = {name for stage in pipe.stages for name in stage.trainable}
    for tie in pipe._ties:
        stages = tied_stages(pipe, tie)
        members = _members(pipe, stages)
        if len(members) > 1 and tie.holders[0].name in trainable:
            found.append(Group(tie.group, members, stages, [0]))
    return found


def given(pipe: Pipeline, parts: list[Nest], targets: list[Nest] | None) -> dict[Port, Any]:
    """The micro-batches' inputs and targets by the port that awaits them; ValueError if a name is missing."""
    check_inputs(parts[0], pipe._wires)
    return routes.given(parts, targets, pipe.schedule.stages, hops(pipe))
