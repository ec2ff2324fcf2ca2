"""Choose who takes the places of lost workers: whoever can go on with what the dead one has kept comes first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rpcpipe.cluster.rendezvous import Member, Starter, Worker
from rpcpipe.errors import WorkerLost


class Successor(NamedTuple):
    """Who takes a place: ``spare``, or a new process on ``device`` where it is None. ``event``: what this is called."""

    event: str
    device: str
    spare: Worker | None


def choose_successors(
    places: Iterable[Worker], spares: Sequence[Worker], members: Mapping[str, Member], starter: Starter
) -> dict[str, Successor]:
    """Return who takes each of ``places``, by name; ``members``: the lost ones and the spares.

    What a worker has kept is where it was started, so a spare from there or another process there goes before any
    other spare, and that before a stand-in on the driver's host. A spare has the same kind of device. Raises
    WorkerLost where there is nobody.
    """
    free, chosen, left = list(spares), dict[str, Successor](), list[Worker]()
    for place in places:
        lost = members[place.name]
        fitting = [spare for spare in free if _kind(spare.device) == _kind(place.device)]
        near = [spare for spare in fitting if members[spare.name].domain == lost.domain]
        if near or (fitting and not lost.home_lives):
            spare = (near or fitting)[0]
            free.remove(spare)
            chosen[place.name] = Successor("spare used", spare.device, spare)
        elif lost.home_lives:
            chosen[place.name] = Successor("replaced", place.device, None)
        elif (device := starter.stand_in(place.device)) is not None:
            chosen[place.name] = Successor("stands in", device, None)
        else:
            left.append(place)
    if left:
        raise _nobody(left, members)
    return chosen


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _nobody(left: Sequence[Worker], members: Mapping[str, Member]) -> WorkerLost:
    ended = ", ".join(f"{place.name} ({members[place.name].domain})" for place in left)
    first = left[0]
    kinds = " and ".join(sorted({_kind(place.device) for place in left}))
    return WorkerLost(
        f"nobody can take the place of {ended}: the rank's process or its host has ended, no spare on {kinds} is left,"
        " and nobody stands in. Start the rank again (`python -m rpcpipe.worker` with the same variables and any RANK"
        ' that nobody has) and make the call again; or begin with rp.connect(spares=…) or rp.connect(heal="shrink")',
        worker=first.name, host=first.host, pid=first.pid,
    )  # fmt: skip
