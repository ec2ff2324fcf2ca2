"""The inputs and outputs of a stage as one nest: the running value and the named values beside it.

Everything that works on a nest (gradients by tensor, recomputation, split backwards) works on this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rpcpipe.model.microbatch import Nest, tensors
from rpcpipe.model.wiring import Flow
from rpcpipe.stage.autograd import Gradients, StageInput


def join(parcels: Mapping[str, StageInput]) -> tuple[StageInput, dict[str, int]]:
    """Return the inputs of all links as one StageInput of a Flow, and the number of gradients per link to return."""
    x = None
    values: dict[str, Nest] = {}
    for link, parcel in parcels.items():
        x = parcel.nest[0] if link == "input" else x
        values |= parcel.nest[1]
    flags = [flag for parcel in parcels.values() for flag in parcel.wants_grad]
    aliased: list[int] = []
    before = 0
    for parcel in parcels.values():
        aliased += [before + number for number in parcel.aliased]
        before += len(parcel.wants_grad)
    return StageInput((x, values), flags, aliased), {link: sum(parcel.wants_grad) for link, parcel in parcels.items()}


def part(flow: StageInput, outgoing: Mapping[str, Sequence[str]]) -> dict[str, StageInput]:
    """Return the outputs by link, the inverse of ``join``. The values in ``flow`` have the order of ``outgoing``."""
    x, values = flow.nest
    flags, before = iter(flow.wants_grad), 0
    parcels = {}
    for link, names in outgoing.items():
        nest = (x if link == "input" else None, {name: values[name] for name in names})
        own = [next(flags) for _ in tensors(nest)]
        aliased = [number - before for number in flow.aliased if before <= number < before + len(own)]
        parcels[link] = StageInput(nest, own, aliased)
        before += len(own)
    return parcels


def leaving(flow: Flow, outgoing: Mapping[str, Sequence[str]]) -> Flow:
    """Return ``flow`` with the values that leave the stage, in the order of ``outgoing``."""
    return flow[0], {name: flow[1][name] for names in outgoing.values() for name in names}


def cut(grads: Gradients, counts: Mapping[str, int]) -> dict[str, Gradients]:
    """Return ``grads`` by link; ``counts`` holds the number of gradients for each link, in order."""
    remaining = iter(grads)
    return {link: [next(remaining) for _ in range(count)] for link, count in counts.items()}
