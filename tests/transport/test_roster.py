"""Who stands for a name, and whose messages count."""

from __future__ import annotations

import itertools

import pytest

from rpcpipe.errors import StateError
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.roster import DRIVERS_SEAT, Roster, Seat, Seats, sender_of

FIRST, SECOND, SUCCESSOR, SPARE = (Seat(f"{name}-{number}", number) for number, name in enumerate("abac", 1))


def roster(name: str, **changes: Seat) -> Roster:
    return Roster("a generation", name, {DRIVER: DRIVERS_SEAT, "a": FIRST, "b": SECOND, **changes})


def test_every_process_gets_another_seat_until_torchs_numbers_are_used_up() -> None:
    seats = Seats()
    given = [seats.give("a") for _ in range((1 << 15) - 1)]
    assert len({seat.wire for seat in given}) == len({seat.number for seat in given}) == len(given)
    with pytest.raises(StateError, match="32767"):
        seats.give("a")


def test_a_message_counts_between_those_who_have_seats_alone() -> None:
    a, b, driver = roster("a"), roster("b"), roster(DRIVER)
    for sender, (name, receiver) in itertools.product((a, b, driver), [("a", a), ("b", b), (DRIVER, driver)]):
        assert receiver.accepts(sender.stamp(name))
    assert not a.accepts(b.stamp(DRIVER))
    assert not a.accepts(Roster("another generation", "b", b.seats).stamp("a"))


def test_nothing_of_the_dead_or_for_them_is_taken_once_they_are_replaced() -> None:
    dead, b = roster("a"), roster("b")
    successor = roster("a", a=SUCCESSOR)
    late, meant_for_the_dead, early = dead.stamp("b"), b.stamp("a"), successor.stamp("b")
    assert b.accepts(late)
    assert not b.accepts(early)
    assert b.seat({"a": SUCCESSOR}) == [FIRST]
    assert not b.accepts(late)
    assert b.accepts(early)
    assert not successor.accepts(meant_for_the_dead)
    assert successor.accepts(b.stamp("a"))
    assert (b.knows(FIRST.wire), b.knows(SUCCESSOR.wire)) == (False, True)


def test_a_spare_takes_a_name_and_keeps_its_seat() -> None:
    b, spare = roster("b", spare=SPARE), roster("spare", spare=SPARE)
    for one in (b, spare):
        assert one.seat({"a": SPARE}) == [FIRST]
        assert set(one.seats) == {DRIVER, "a", "b"}
    assert spare.accepts(b.stamp("a"))
    assert b.accepts(spare.stamp("b"))


def test_who_is_dismissed_has_no_seat() -> None:
    b = roster("b")
    assert b.seat({}, ["a"]) == [FIRST]
    assert not b.accepts(roster("a").stamp("b"))
    assert not b.knows(FIRST.wire)
    assert b.stamp("a") == roster("b").stamp("a")
    assert b.seat({"a": SUCCESSOR}) == [FIRST]
    assert b.accepts(roster("a", a=SUCCESSOR).stamp("b"))


def test_the_end_of_a_lane_tells_who_sends() -> None:
    a = roster("a")
    lane = a.lane("b")
    assert lane is not None
    assert lane[1] == roster("b").address
    assert sender_of(lane[0].encode()) == FIRST.wire
    assert a.lane("b") != lane
    assert (sender_of(""), sender_of(b"\0rpcpipe")) == ("", "\0rpcpipe")
