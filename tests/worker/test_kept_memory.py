"""The memory in which a worker's state is kept: how it grows, goes, is held, and what ends the keeping."""

from __future__ import annotations

import gc
import logging
import os
from typing import Any

import pytest
import torch
from torch import nn

from rpcpipe.cluster.kept_descriptor import KeptDescriptor
from rpcpipe.stage.kept_memory import Condition, KeptMemory, look
from rpcpipe.transport.user_pickling import dumps
from rpcpipe.worker.operations import CallModule
from support.kinds import KINDS, Stateful, solo, tied
from support.models import adamw
from support.solo import Solo, revived, spec_of


@pytest.fixture(params=KINDS)
def worker(request: pytest.FixtureRequest) -> Solo:
    return solo(request.param)


def test_training_takes_no_more_memory_once_it_runs(worker: Solo) -> None:
    worker.step(0)
    worker.step(1)
    worker.step(2)
    before = os.stat(worker.path).st_blocks
    for step in range(3, 20):
        worker.step(step)
    assert os.stat(worker.path).st_blocks <= before + 16


def test_the_memory_goes_with_the_worker() -> None:
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    worker = solo("adamw")
    worker.step(0)
    del worker
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_keeper_sees_what_comes_after_it_and_outlives_the_worker() -> None:
    worker = solo("adamw")
    kept_at = worker.actor.held.kept_at
    assert kept_at is not None
    keeper = KeptDescriptor(*kept_at)
    for step in range(2):
        worker.step(step)
    assert keeper.look() == (1, True, 1, Condition.KEPT)
    state = worker.state()
    del worker
    gc.collect()
    assert Solo.revived(keeper.path).state() == state
    keeper.close()


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(24, "no more files")

    monkeypatch.setattr(os, "memfd_create", refuse)


@pytest.mark.usefixtures("no_memory")
def test_without_such_memory_it_trains_and_says_that_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rpcpipe.worker"):
        worker = solo("adamw")
    worker.step(0)
    assert worker.actor.describe()[0].kept_at is None
    assert "cannot be replaced" in caplog.text


def test_what_cannot_be_pickled_is_said_and_may_be_mended(caplog: pytest.LogCaptureFixture) -> None:
    worker = solo("adamw")
    kept_at = worker.actor.held.kept_at
    assert kept_at is not None
    with caplog.at_level(logging.WARNING, "rpcpipe.worker"):
        worker.execute(CallModule(0, dumps(give_a_generator), None))
    assert look(kept_at.descriptor).condition is Condition.LOST
    assert "cannot pickle" in caplog.text
    worker.step(0)
    worker.execute(CallModule(0, dumps(take_the_generator), None))
    assert look(kept_at.descriptor).condition is Condition.KEPT
    assert revived(worker).state() == worker.state()


def give_a_generator(module: nn.Module) -> None:
    module.get_submodule("0").items = (item for item in "abc")  # type: ignore[assignment]


def take_the_generator(module: nn.Module) -> None:
    del module.get_submodule("0").items


def test_nothing_is_taken_over_of_a_memory_in_which_something_is_lost() -> None:
    worker = solo("adamw")
    worker.execute(CallModule(0, dumps(give_a_generator), None))
    with pytest.raises(ValueError, match="could not be kept"):
        revived(worker)


def test_a_file_that_is_no_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="is no memory"):
        KeptMemory.open(__file__)


def test_views_and_tied_weights_share_their_memory_again() -> None:
    worker = Solo.of(spec_of([Stateful(), *tied()], adamw))
    worker.step(0)
    successor = revived(worker)
    modules = dict(successor.actor.held.stages[0].module.named_modules())
    assert modules["1"].weight is modules["3"].weight
    state: Any = modules["0"]
    with torch.no_grad():
        state.linear.weight.fill_(3.0)
    assert state.row.tolist() == [3.0] * 4


def test_a_copy_lies_in_the_memory_from_the_beginning() -> None:
    """On the heap it would be there twice for a while, beside a step's activations."""
    worker = solo(next(iter(KINDS)))
    worker.step(0)
    undo: Any = worker.actor.held.optimizer.undo  # type: ignore[union-attr]
    undo.copies.clear()
    undo.begin(7)
    while undo.refresh_one():
        pass
    memory: Any = undo.watch._memory
    values = [value for value, _ in undo.copies.values()]
    assert values
    assert all(memory.holds(value) for value in values)
