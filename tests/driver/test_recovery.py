"""Which step is rolled back, when and how often: the table, and what a failed step really sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.driver.recovery import (
    Begin,
    Event,
    Fail,
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
BACK, UPDATE_BACK = RollBack(5, FIRST, updating=False), RollBack(5, FIRST, updating=True)

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
]


@pytest.mark.parametrize(("state", "event", "after", "undone"), TABLE, ids=str)
def test_the_table(state: State, event: Event, after: State, undone: RollBack | None) -> None:
    assert transition(state, event) == (after, undone)


def test_the_table_has_every_state_and_event() -> None:
    kinds = {(type(state), type(event)) for state, event, _, _ in TABLE}
    assert len(kinds) == 4 * 5


def test_another_steps_calls_come_after_the_rolling_back() -> None:
    with pytest.raises(AssertionError, match="OtherCall comes first"):
        transition(RUNNING, Begin(6, LATER))


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
