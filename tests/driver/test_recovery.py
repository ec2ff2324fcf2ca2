"""Which step is rolled back, when and how often: the table, and what a failed step really sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.driver.recovery import (
    Ahead,
    Begin,
    BeginAhead,
    Event,
    Fail,
    Follow,
    Idle,
    OtherCall,
    RollBack,
    Running,
    Settled,
    State,
    Succeed,
    TakeBack,
    Updating,
    transition,
)
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd
from support.sent import Sent

FIRST, LATER = {"worker0": 3}, {"worker0": 9}
RUNNING, UPDATING, SETTLED = Running(5, FIRST), Updating(5, FIRST), Settled(5, FIRST)
BACK, UPDATE_BACK = RollBack(FIRST, 5), RollBack(FIRST, 5, updating=True)
AHEAD = Ahead(6, LATER)
RUNNING_2, UPDATING_2, SETTLED_2 = Running(5, FIRST, AHEAD), Updating(5, FIRST, AHEAD), Settled(5, FIRST, AHEAD)
AHEAD_BACK, BOTH_BACK = RollBack(LATER, ahead=6), RollBack(FIRST, 5, ahead=6)
UPDATE_AND_AHEAD_BACK = RollBack(FIRST, 5, updating=True, ahead=6)

TABLE: list[tuple[State, Event, State, RollBack | None]] = [
    (Idle(), Begin(5, FIRST), RUNNING, None),
    (Idle(), Begin(5, FIRST, updating=True), UPDATING, None),
    (Idle(), Succeed(), Idle(), None),
    (Idle(), Fail(), Idle(), None),
    (Idle(), TakeBack(5, updating=False), Idle(), None),
    (Idle(), TakeBack(5, updating=True), Idle(), None),
    (Idle(), OtherCall(5), Idle(), None),
    (Idle(), OtherCall(-1), Idle(), None),
    (RUNNING, Begin(5, LATER), RUNNING, None),
    (RUNNING, Begin(5, LATER, updating=True), UPDATING, None),
    (RUNNING, Succeed(), SETTLED, None),
    (RUNNING, Fail(), Idle(), BACK),
    (RUNNING, TakeBack(5, updating=False), Idle(), BACK),
    (RUNNING, TakeBack(5, updating=True), Idle(), UPDATE_BACK),
    (RUNNING, TakeBack(4, updating=True), RUNNING, None),
    (RUNNING, OtherCall(5), RUNNING, None),
    (RUNNING, OtherCall(6), Idle(), BACK),
    (RUNNING, OtherCall(-1), Idle(), BACK),
    (UPDATING, Begin(5, LATER), RUNNING, None),
    (UPDATING, Begin(5, LATER, updating=True), UPDATING, None),
    (UPDATING, Succeed(), SETTLED, None),
    (UPDATING, Fail(), Idle(), UPDATE_BACK),
    (UPDATING, TakeBack(5, updating=False), Idle(), UPDATE_BACK),
    (UPDATING, TakeBack(5, updating=True), Idle(), UPDATE_BACK),
    (UPDATING, TakeBack(4, updating=False), UPDATING, None),
    (UPDATING, OtherCall(5), UPDATING, None),
    (UPDATING, OtherCall(6), Idle(), UPDATE_BACK),
    (UPDATING, OtherCall(-1), Idle(), UPDATE_BACK),
    (SETTLED, Begin(5, LATER), RUNNING, None),
    (SETTLED, Begin(5, LATER, updating=True), UPDATING, None),
    (SETTLED, Begin(6, LATER), Running(6, LATER), None),
    (SETTLED, Begin(6, LATER, updating=True), Updating(6, LATER), None),
    (SETTLED, Succeed(), SETTLED, None),
    (SETTLED, Fail(), SETTLED, None),
    (SETTLED, TakeBack(5, updating=False), Idle(), BACK),
    (SETTLED, TakeBack(5, updating=True), Idle(), UPDATE_BACK),
    (SETTLED, TakeBack(4, updating=True), SETTLED, None),
    (SETTLED, OtherCall(5), SETTLED, None),
    (SETTLED, OtherCall(6), SETTLED, None),
    (SETTLED, OtherCall(-1), SETTLED, None),
    (RUNNING, BeginAhead(6, LATER), RUNNING_2, None),
    (RUNNING_2, Begin(5, LATER, updating=True), UPDATING_2, None),
    (RUNNING_2, Succeed(), SETTLED_2, None),
    (RUNNING_2, Fail(), Idle(), BOTH_BACK),
    (RUNNING_2, TakeBack(5, updating=False), Idle(), BOTH_BACK),
    (RUNNING_2, OtherCall(5), RUNNING_2, None),
    (RUNNING_2, OtherCall(6), RUNNING_2, None),
    (RUNNING_2, OtherCall(-1), Idle(), BOTH_BACK),
    (UPDATING, BeginAhead(6, LATER), UPDATING_2, None),
    (UPDATING_2, Succeed(), SETTLED_2, None),
    (UPDATING_2, Fail(), Idle(), UPDATE_AND_AHEAD_BACK),
    (UPDATING_2, TakeBack(5, updating=True), Idle(), UPDATE_AND_AHEAD_BACK),
    (UPDATING_2, OtherCall(6), UPDATING_2, None),
    (UPDATING_2, OtherCall(7), Idle(), UPDATE_AND_AHEAD_BACK),
    (SETTLED, BeginAhead(6, LATER), SETTLED_2, None),
    (SETTLED_2, Begin(5, LATER), RUNNING_2, None),
    (SETTLED_2, Follow(updating=False), Running(6, LATER), None),
    (SETTLED_2, Follow(updating=True), Updating(6, LATER), None),
    (SETTLED_2, Succeed(), SETTLED_2, None),
    (SETTLED_2, Fail(), SETTLED_2, None),
    (SETTLED_2, TakeBack(4, updating=True), SETTLED_2, None),
    (SETTLED_2, TakeBack(5, updating=True), Idle(), UPDATE_AND_AHEAD_BACK),
    (SETTLED_2, TakeBack(6, updating=True), SETTLED, AHEAD_BACK),
    (SETTLED_2, OtherCall(5), SETTLED_2, None),
    (SETTLED_2, OtherCall(6), SETTLED_2, None),
    (SETTLED_2, OtherCall(-1), SETTLED, AHEAD_BACK),
]
# (state, event, what the driver must never do)
NEVER: list[tuple[State, Event, str]] = [
    (RUNNING, Begin(6, LATER), "OtherCall comes first"),
    (SETTLED_2, Begin(6, LATER), "OtherCall comes first"),
    (Idle(), BeginAhead(6, LATER), "follows another"),
    (SETTLED_2, BeginAhead(7, LATER), "one step runs ahead"),
    (RUNNING_2, Follow(updating=True), "settled first"),
    (Idle(), Follow(updating=True), "settled first"),
    (SETTLED, Follow(updating=True), "ran ahead"),
    (UPDATING_2, Follow(updating=True), "settled first"),
    (UPDATING_2, TakeBack(6, updating=False), "those of the step before"),
]


@pytest.mark.parametrize(("state", "event", "after", "undone"), TABLE, ids=str)
def test_the_table(state: State, event: Event, after: State, undone: RollBack | None) -> None:
    assert transition(state, event) == (after, undone)


def test_the_tables_have_every_state_and_event() -> None:
    kinds = {(type(state), type(event)) for state, event, *_ in [*TABLE, *NEVER]}
    assert len(kinds) == 4 * 7


@pytest.mark.parametrize(("state", "event", "why"), NEVER, ids=str)
def test_what_never_happens(state: State, event: Event, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        transition(state, event)


class Boom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.abs().max() > 1e6:
            raise ValueError("boom")
        return x


class BoomSGD(torch.optim.SGD):
    """Raises once, in the second step, on whichever worker comes first."""

    updates = 0

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        BoomSGD.updates += 1
        if BoomSGD.updates == 4:
            raise RuntimeError("boom")


def give_up(pipe: rp.Pipeline, x: torch.Tensor, y: torch.Tensor) -> None:
    with pipe.step() as step:
        step.forward_backward(x, y)
        raise KeyError("boom")


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
@pytest.mark.parametrize("where", ["forward", "optimizer", "with-block"])
def test_a_failed_step_is_cancelled_and_undone_once_on_every_worker(where: str, dispatch: str) -> None:
    BoomSGD.updates = 0
    cluster: Any = LocalCluster(3, 1)
    sent = Sent(cluster)
    model = [*mlp()[:-1], Boom(), mlp()[-1]]
    factory = (lambda params: BoomSGD(params, lr=0.1)) if where == "optimizer" else sgd
    pipe = rp.Pipeline(model, cluster, loss=cross_entropy, optimizer=factory, chunks=2, dispatch=dispatch)
    BoomSGD.updates = 0  # copies have updated, when the pipeline was made
    x, y = next(batches(1))
    pipe.train_step(x, y)
    sent.clear()
    before = pipe.state_dict()
    with pytest.raises((rp.StageError, KeyError), match="boom"):
        give_up(pipe, x, y) if where == "with-block" else pipe.train_step(x * 1e9 if where == "forward" else x, y)
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    assert (sent.verbs["cancel"], sent.operations["RollBackStep"]) == (3, 3)
    assert pipe.train_step(x, y).applied
    assert (sent.verbs["cancel"], sent.operations["RollBackStep"]) == (3, 3)
