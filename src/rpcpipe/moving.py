"""A schedule of other stages or other places, in a live run: the layers go where it wants them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rpcpipe.arguments import owners, stage_parts

if TYPE_CHECKING:
    from rpcpipe.pipeline import Pipeline


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
            replies[name] = driver.post(name, "arrange", mine, schedule.stages - 1, given[name])
        pipe._adopt(driver.collect(replies))
    except BaseException:
        pipe.close()
        raise
