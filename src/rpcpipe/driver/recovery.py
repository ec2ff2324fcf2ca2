"""What of a step must be rolled back on the workers, decided without sending anything.

    Idle ──begin──▶ Running ──succeed──▶ Settled
                     │    └──update──▶ Updating ──succeed──▶ Settled
                     └── fail, take_back, another step's call: roll back once, then Idle

A step that is settled can still be taken back (by an exception in the caller's with-block, by a Ctrl-C that came
after the last worker had updated); one that was rolled back cannot be rolled back again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Idle:
    """No step has anything that could be rolled back."""


@dataclass(frozen=True)
class Running:
    """Calls of ``step`` are under way. ``first``: each worker's place in its sequence where the step began."""

    step: int
    first: Mapping[str, int]


@dataclass(frozen=True)
class Updating:
    """Updates of ``step`` are under way, so weights may have changed."""

    step: int
    first: Mapping[str, int]


@dataclass(frozen=True)
class Settled:
    """All that was asked of ``step`` has ended well."""

    step: int
    first: Mapping[str, int]


State = Idle | Running | Updating | Settled


@dataclass(frozen=True)
class Begin:
    """Calls of ``step`` are about to be sent; ``places``: each worker's next one. ``updating``: updates are."""

    step: int
    places: Mapping[str, int]
    updating: bool = False


@dataclass(frozen=True)
class Succeed:
    """What was begun has ended well on all workers."""


@dataclass(frozen=True)
class Fail:
    """What was begun has failed, or was interrupted."""


@dataclass(frozen=True)
class TakeBack:
    """The caller gives ``step`` up; ``updating``: its update may have been applied."""

    step: int
    updating: bool


@dataclass(frozen=True)
class OtherCall:
    """Something that is no part of the step, but of ``step`` (-1: of none), is about to be sent."""

    step: int


Event = Begin | Succeed | Fail | TakeBack | OtherCall


@dataclass(frozen=True)
class RollBack:
    """To be sent to every worker, once: drop ``step`` from ``first`` on and undo what it did."""

    step: int
    first: Mapping[str, int]
    updating: bool


def transition(state: State, event: Event) -> tuple[State, RollBack | None]:
    """Return the next state, and what is to be rolled back before anything else is sent."""
    if isinstance(event, Begin):
        assert isinstance(state, Idle | Settled) or state.step == event.step, "OtherCall comes first"
        first = event.places if isinstance(state, Idle) or state.step != event.step else state.first
        return (Updating if event.updating else Running)(event.step, first), None
    if isinstance(state, Idle):
        return state, None
    under_way = not isinstance(state, Settled)
    if isinstance(event, Succeed):
        return Settled(state.step, state.first), None
    if isinstance(event, TakeBack):
        ends, updating = event.step == state.step, event.updating or isinstance(state, Updating)
    else:
        ends = under_way and not (isinstance(event, OtherCall) and event.step == state.step)
        updating = isinstance(state, Updating)
    return (Idle(), RollBack(state.step, state.first, updating)) if ends else (state, None)
