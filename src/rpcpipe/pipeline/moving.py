"""A schedule of other stages or other places, in a live run: the layers go where it wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rpcpipe import schedules
from rpcpipe.driver.feeding import links
from rpcpipe.pipeline.arguments import check_ties, make_schedule, owners, refuse, stage_parts
from rpcpipe.pipeline.deploy import adopt, renew
from rpcpipe.planning import partition
from rpcpipe.schedules import Schedule, weight_versions

if TYPE_CHECKING:
    from rpcpipe.pipeline.pipeline import Pipeline


def change(pipe: Pipeline, wanted: str | Schedule) -> None:
    """What setting ``pipe.schedule`` does; refusals leave everything as it was."""
    refuse(pipe._open is not None, "the schedule cannot change inside a step")
    before_change, virtual = pipe.schedule, pipe._virtual_stages
    if isinstance(wanted, str):
        virtual = schedules.suited_virtual_stages(wanted, virtual)
    new = make_schedule(wanted, pipe._layout.width, pipe.chunks, virtual, pipe._layout.replicas)
    refuse(new.workers != pipe._layout.width, f"{new.name!r} is for {new.workers} workers, not {pipe._layout.width}")
    policy = weight_versions.choose(new.name, pipe._weights if new.name == before_change.name else None)
    pipe._check_policy(policy)
    moving = new.placement != before_change.placement
    before, balance = _places(pipe), pipe.balance
    if new.stages != before_change.stages:
        sizes = {layer: count for stage in pipe.stages for layer, count in stage.sizes.items()}
        balance = partition.balance([sizes[layer] for layer in pipe._layers], new.stages)
    check_ties(policy, pipe._ties, pipe._layers, balance)
    pipe._schedule, pipe.chunks, pipe._policy, pipe.balance = new, new.chunks, policy, balance
    if moving:
        move(pipe, before)
    else:
        renew(pipe)


def _places(pipe: Pipeline) -> list[dict[str, str]]:
    """By replica, the worker of every layer."""
    layout = pipe._layout
    rows = map(layout.row, range(layout.replicas))
    return [owners(pipe._layers, pipe.balance, pipe.schedule, row) for row in rows]


def move(pipe: Pipeline, before: Sequence[Mapping[str, str]]) -> None:
    """Bring every layer, with its optimizer state, to the worker that the pipeline's new schedule gives it.

    ``before``: by replica, the worker of every layer until now. What raises here closes the pipeline, as
    some layers may be on neither worker's stages.
    """
    schedule, driver = pipe.schedule, pipe._driver
    moves: dict[tuple[str, str], list[str]] = {}
    for old, new in zip(before, _places(pipe), strict=True):
        for layer in pipe._layers:
            if old[layer] != new[layer]:
                moves.setdefault((old[layer], new[layer]), []).append(layer)
    try:
        states = _sharded_states(pipe)
        given: dict[str, list[bytes]] = {name: [] for name in pipe._names}
        for (source, target), moving in moves.items():
            given[target].append(driver.control(source, "give", moving))
        parts = stage_parts(pipe._layers, pipe.balance)
        replies = {}
        for name in pipe._names:
            worker, _ = pipe._layout.index(name)
            mine = {stage: part for stage, part in parts.items() if schedule.placement[stage] == worker}
            others = {layer: states[layer] for layers, _ in mine.values() for layer in layers if layer in states}
            replies[name] = driver.post(name, "arrange", mine, schedule.stages - 1, links(pipe), given[name], others)
        adopt(pipe, driver.collect(replies))
    except BaseException:
        pipe.close()
        raise


def _sharded_states(pipe: Pipeline) -> dict[str, dict[str, Any]]:
    """Where replicas share the optimizer's state, all of it by layer: who owns what changes with the stages."""
    if not pipe._shard:
        return {}
    driver, whole = pipe._driver, dict[str, dict[str, Any]]()
    for part in driver.collect({name: driver.post(name, "optimizer_state") for name in pipe._names}).values():
        for layer, state in part.items():
            whole.setdefault(layer, {}).update(state)
    return whole
