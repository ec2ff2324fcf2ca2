"""Decide, without sending anything, what of a step must be rolled back on the workers.

    Idle ──begin──▶ Running ──succeed──▶ Settled
                     │    └──update──▶ Updating ──succeed──▶ Settled
                     └── fail, take_back, another step's call: roll back once, then Idle

A settled step can still be rolled back (after an exception in the caller's with-block, or a Ctrl-C that came
after the last worker had updated). No step is rolled back twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Idle:
    """There is nothing that could be rolled back."""


@dataclass(frozen=True)
class Running:
    """Calls of ``step`` are under way. ``first``: by worker, the place in its sequence where the step began."""

    step: int
    first: Mapping[str, int]


@dataclass(frozen=True)
class Updating:
    """Updates of ``step`` are under way, so weights may have changed."""

    step: int
    first: Mapping[str, int]


@dataclass(frozen=True)
class Settled:
    """All calls of ``step`` have succeeded."""

    step: int
    first: Mapping[str, int]


State = Idle | Running | Updating | Settled


@dataclass(frozen=True)
class Begin:
    """Calls of ``step`` are about to be sent, with ``updating`` its updates. ``places``: each worker's next place."""

    step: int
    places: Mapping[str, int]
    updating: bool = False


@dataclass(frozen=True)
class Succeed:
    """The calls under way have succeeded on all workers."""


@dataclass(frozen=True)
class Fail:
    """The calls under way have failed or were interrupted."""


@dataclass(frozen=True)
class TakeBack:
    """The caller gives up ``step``; ``updating``: its update may have been applied."""

    step: int
    updating: bool


@dataclass(frozen=True)
class OtherCall:
    """A call of ``step`` (-1: of no step), which may be another step than the one under way, is about to be sent."""

    step: int


Event = Begin | Succeed | Fail | TakeBack | OtherCall


@dataclass(frozen=True)
class RollBack:
    """The order to every worker to drop the tasks of ``step`` from ``first`` on and undo its effects, sent once."""

    step: int
    first: Mapping[str, int]
    updating: bool


def transition(state: State, event: Event) -> tuple[State, RollBack | None]:
    """Return the next state, and the rollback that must be sent before any other call, if any."""
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
