"""A schedule of other stages or other places, in a live run: the layers go where it wants them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rpcpipe import schedules, versions
from rpcpipe.arguments import make_schedule, owners, refuse, stage_parts
from rpcpipe.building import adopt
from rpcpipe.errors import PartitionError
from rpcpipe.feeding import hops
from rpcpipe.partition import balance as cut
from rpcpipe.schedules import Schedule

if TYPE_CHECKING:
    from rpcpipe.pipeline import Pipeline


def change(pipe: Pipeline, wanted: str | Schedule) -> None:
    """What setting ``pipe.schedule`` does; refusals leave everything as it was."""
    refuse(pipe._open is not None, "the schedule cannot change inside a step")
    before_change, virtual = pipe.schedule, pipe._virtual_stages
    if isinstance(wanted, str):
        virtual = schedules.suited_virtual_stages(wanted, virtual)
    new = make_schedule(wanted, len(pipe._names), pipe.chunks, virtual)
    refuse(new.workers != len(pipe._names), f"{new.name!r} is for {new.workers} workers, not {len(pipe._names)}")
    policy = versions.choose(new.name, pipe._weights if new.name == before_change.name else None)
    pipe._check_policy(policy)
    moving = new.placement != before_change.placement
    if moving and pipe._tied is not None:
        raise PartitionError(f"{pipe._tied} are one parameter: its layers cannot be moved one by one")
    before = owners(pipe._layers, pipe.balance, before_change, pipe._names)
    if new.stages != before_change.stages:
        sizes = {layer: count for stage in pipe.stages for layer, count in stage.sizes.items()}
        pipe.balance = cut([sizes[layer] for layer in pipe._layers], new.stages)
    pipe._schedule, pipe.chunks, pipe._routes, pipe._policy = new, new.chunks, {}, policy
    if moving:
        move(pipe, before)


def move(pipe: Pipeline, before: Mapping[str, str]) -> None:
    """Bring every layer, with its optimizer state, to the worker that the pipeline's new schedule gives it.

    ``before``: the worker of every layer until now. What raises here closes the pipeline, as some
    layers may be on neither worker's stages.
    """
    layers, schedule, driver, names = pipe._layers, pipe.schedule, pipe._driver, pipe._names
    after = owners(layers, pipe.balance, schedule, names)
    moves: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if before[layer] != after[layer]:
            moves.setdefault((before[layer], after[layer]), []).append(layer)
    try:
        given: dict[str, list[bytes]] = {name: [] for name in names}
        for (source, target), moving in moves.items():
            given[target].append(driver.control(source, "give", moving))
        parts = stage_parts(layers, pipe.balance)
        replies = {}
        for worker, name in enumerate(names):
            mine = {stage: part for stage, part in parts.items() if schedule.placement[stage] == worker}
            replies[name] = driver.post(name, "arrange", mine, schedule.stages - 1, hops(pipe), given[name])
        adopt(pipe, driver.collect(replies))
    except BaseException:
        pipe.close()
        raise
