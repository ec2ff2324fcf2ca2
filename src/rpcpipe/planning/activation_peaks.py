"""The peak of activation memory under a schedule, computed before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rpcpipe.schedules.order import Order

# drops(stage, chunk): whether the activations are dropped after the forward and recomputed before the backward.
Drops = Callable[[int, int], bool]


def peak_activation_bytes(
    order: Order,
    activations: Sequence[int],
    inputs: Sequence[int],
    drops: Drops = lambda stage, chunk: False,
) -> tuple[int, ...]:
    """Return per stage the most bytes of activations alive at once.

    ``activations[stage]`` and ``inputs[stage]``: bytes of one micro-batch. Where ``drops(stage, chunk)``
    holds, only the input is kept until the backward, which repeats the forward. Activations of a
    split backward count until its weight half is done.
    """
    return _peaks(order, activations, inputs, [0] * order.stages, drops, range(order.stages))[0]


def peak_worker_bytes(
    order: Order,
    activations: Sequence[int],
    inputs: Sequence[int],
    working: Sequence[int],
    drops: Drops = lambda stage, chunk: False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return per worker the most bytes of activations that its stages hold together at once, without and with others.

    ``working[stage]``: what the backward of one micro-batch has at once beside its activations.
    """
    return _peaks(order, activations, inputs, working, drops, order.placement)


def _peaks(
    order: Order,
    activations: Sequence[int],
    inputs: Sequence[int],
    working: Sequence[int],
    drops: Drops,
    groups: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the peak of every group of stages, and that with ``working``; ``groups[stage]`` is the stage's group."""
    alive, peak, whole = ([0] * (max(groups) + 1) for _ in range(3))
    for row in order.actions:
        for kind, stage, chunk in row:
            group = groups[stage]
            if kind == "F":
                alive[group] += inputs[stage] if drops(stage, chunk) else activations[stage]
            elif kind in "BI" and drops(stage, chunk):
                alive[group] += activations[stage] - inputs[stage]
            peak[group] = max(peak[group], alive[group])
            whole[group] = max(whole[group], alive[group] + working[stage] * (kind in "BI"))
            if kind in "BW":
                alive[group] -= activations[stage]
    return tuple(peak), tuple(whole)
