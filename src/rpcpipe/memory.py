"""How many bytes of activations every stage holds at most: read off the schedule, before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rpcpipe.schedules.schedule import Schedule


def peak_activation_bytes(
    schedule: Schedule,
    activations: Sequence[int],
    inputs: Sequence[int],
    drops: Callable[[int, int], bool] = lambda stage, chunk: False,
) -> tuple[int, ...]:
    """Per stage, the most alive at once.

    ``activations[stage]`` and ``inputs[stage]``: bytes of one micro-batch. Where ``drops(stage, chunk)``
    holds, the input alone is kept until the backward, which runs the forward again. Activations of a
    split backward count until its weight half is done.
    """
    alive, peak = [0] * schedule.stages, [0] * schedule.stages
    for row in schedule.actions:
        for kind, stage, chunk in row:
            dropped = drops(stage, chunk)
            if kind == "F":
                alive[stage] += inputs[stage] if dropped else activations[stage]
            elif kind in "BI" and dropped:
                alive[stage] += activations[stage] - inputs[stage]
            peak[stage] = max(peak[stage], alive[stage])
            if kind in "BW":
                alive[stage] -= activations[stage]
    return tuple(peak)
