"""How many bytes of activations are held at most: read off the schedule, before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rpcpipe.schedules import Schedule

Drops = Callable[[int, int], bool]


def peak_activation_bytes(
    schedule: Schedule,
    activations: Sequence[int],
    inputs: Sequence[int],
    drops: Drops = lambda stage, chunk: False,
) -> tuple[int, ...]:
    """Per stage, the most alive at once.

    ``activations[stage]`` and ``inputs[stage]``: bytes of one micro-batch. Where ``drops(stage, chunk)``
    holds, the input alone is kept until the backward, which runs the forward again. Activations of a
    split backward count until its weight half is done.
    """
    return _peaks(schedule, activations, inputs, drops, range(schedule.stages))


def peak_worker_bytes(
    schedule: Schedule,
    activations: Sequence[int],
    inputs: Sequence[int],
    drops: Drops = lambda stage, chunk: False,
) -> tuple[int, ...]:
    """Per worker, the most that its stages hold together at once."""
    return _peaks(schedule, activations, inputs, drops, schedule.placement)


def _peaks(
    schedule: Schedule, activations: Sequence[int], inputs: Sequence[int], drops: Drops, group: Sequence[int]
) -> tuple[int, ...]:
    """``group[stage]``: whose peak its bytes count for."""
    alive, peak = [0] * (max(group) + 1), [0] * (max(group) + 1)
    for row in schedule.actions:
        for kind, stage, chunk in row:
            at = group[stage]
            if kind == "F":
                alive[at] += inputs[stage] if drops(stage, chunk) else activations[stage]
            elif kind in "BI" and drops(stage, chunk):
                alive[at] += activations[stage] - inputs[stage]
            peak[at] = max(peak[at], alive[at])
            if kind in "BW":
                alive[at] -= activations[stage]
    return tuple(peak)
