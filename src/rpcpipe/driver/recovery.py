"""Decide, without sending anything, what of a step must be rolled back on the workers.

    Idle ──begin──▶ Running ──succeed──▶ Settled ──follow──▶ the step ahead is Running or Updating
                     │    └──update──▶ Updating ──succeed──▶ Settled
                     └── fail, take_back, another step's call: roll back once, then Idle

A settled step can still be rolled back (after an exception in the caller's with-block, or a Ctrl-C that came
after the last worker had updated). No step is rolled back twice.

Beside any step but none one more may run ahead, which comes after it in every worker's sequence and updates nothing
before it follows. It never outlives the step before it, and another call takes it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

# By worker, the place in its sequence where a step began.
Places = Mapping[str, int]


class Ahead(NamedTuple):
    """Calls of ``step`` are under way although the step before may not be settled."""

    step: int
    first: Places


@dataclass(frozen=True)
class Idle:
    """There is nothing that could be rolled back."""


@dataclass(frozen=True)
class Running:
    """Calls of ``step`` are under way. ``first``: by worker, the place in its sequence where the step began."""

    step: int
    first: Places
    ahead: Ahead | None = None


@dataclass(frozen=True)
class Updating:
    """Updates of ``step`` are under way, so weights may have changed."""

    step: int
    first: Places
    ahead: Ahead | None = None


@dataclass(frozen=True)
class Settled:
    """All calls of ``step`` have succeeded."""

    step: int
    first: Places
    ahead: Ahead | None = None


State = Idle | Running | Updating | Settled


@dataclass(frozen=True)
class Begin:
    """Calls of ``step`` are about to be sent, with ``updating`` its updates. ``places``: each worker's next place."""

    step: int
    places: Places
    updating: bool = False


@dataclass(frozen=True)
class BeginAhead:
    """Calls of ``step``, which follows the step under way, are about to be sent."""

    step: int
    places: Places


@dataclass(frozen=True)
class Follow:
    """The step ahead goes on, the one before being settled; ``updating``: it may update."""

    updating: bool


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
    """A call of ``step`` (-1: of no step), which may be another step than those under way, is about to be sent."""

    step: int


Event = Begin | BeginAhead | Follow | Succeed | Fail | TakeBack | OtherCall


@dataclass(frozen=True)
class RollBack:
    """The order to every worker to drop all tasks from ``first`` on and undo the effects of two steps, sent once.

    First those of ``ahead``, if any; then those of ``step``, if any, and with ``updating`` its update.
    """

    first: Places
    step: int | None = None
    updating: bool = False
    ahead: int | None = None


def transition(state: State, event: Event) -> tuple[State, RollBack | None]:
    """Return the next state, and the rollback that must be sent before any other call, if any."""
    match event:
        case Begin():
            return _begin(state, event), None
        case BeginAhead(step, places):
            assert not isinstance(state, Idle), "a step ahead follows another"
            assert state.ahead is None, "one step runs ahead"
            return replace(state, ahead=Ahead(step, places)), None
        case Follow(updating):
            assert isinstance(state, Settled), "the step before is settled first"
            assert state.ahead is not None, "a step follows that ran ahead"
            return (Updating if updating else Running)(*state.ahead), None
    if isinstance(state, Idle):
        return state, None
    if isinstance(event, Succeed):
        return Settled(state.step, state.first, state.ahead), None
    return _undo(state, event)


def _begin(state: State, event: Begin) -> State:
    kind = Updating if event.updating else Running
    if not isinstance(state, Idle) and state.step == event.step:
        return kind(event.step, state.first, state.ahead)
    assert isinstance(state, Idle) or (isinstance(state, Settled) and state.ahead is None), "OtherCall comes first"
    return kind(event.step, event.places)


def _undo(state: Running | Updating | Settled, event: Fail | TakeBack | OtherCall) -> tuple[State, RollBack | None]:
    """Return what follows an event that may end the step under way and the one ahead of it, or the latter alone."""
    under_way, updating = not isinstance(state, Settled), isinstance(state, Updating)
    ahead = None if state.ahead is None else state.ahead.step
    match event:
        case Fail():
            both, alone = under_way, False
        case TakeBack(step, updated):
            both, alone, updating = step == state.step, step == ahead, updating or updated
        case OtherCall(step):
            alone = step not in (state.step, ahead)
            both = alone and under_way
    if both:
        return Idle(), RollBack(state.first, state.step, updating, ahead)
    if alone and state.ahead is not None:
        assert not under_way, "dropping its values would drop those of the step before"
        return replace(state, ahead=None), RollBack(state.ahead.first, ahead=ahead)
    return state, None
