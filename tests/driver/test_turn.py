"""Several threads call one pipeline: one after the other, and who would wait too long is refused."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.misuse import SCHEDULES, assert_as_new, at_once, pipeline
from support.models import batches

BATCH = next(batches(1))
SECONDS = 30.0


@pytest.fixture
def others() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3, thread_name_prefix="other") as threads:
        yield threads


class Gate:
    """A callback that stands in a step until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, _: Any) -> None:
        self.entered.set()
        assert self.opened.wait(SECONDS)


def in_a_step(pipe: rp.Pipeline, others: ThreadPoolExecutor) -> tuple[Gate, Future[Any]]:
    """Let another thread train and stand in its step's callback."""
    gate = Gate()
    pipe.on_step(gate)
    step = others.submit(pipe.train_step, *BATCH)
    assert gate.entered.wait(SECONDS)
    return gate, step


OTHERS: dict[str, Callable[[rp.Pipeline], Any]] = {
    "train_step": lambda pipe: pipe.train_step(*BATCH),
    "train": lambda pipe: next(iter(pipe.train([BATCH]))),
    "evaluate": lambda pipe: pipe.evaluate([BATCH]),
    "predict": lambda pipe: next(pipe.predict([BATCH[0]])),
    "__call__": lambda pipe: pipe(BATCH[0]),
    "state_dict": lambda pipe: pipe.state_dict(),
    "load_state_dict": lambda pipe: pipe.load_state_dict({}),
    "step": lambda pipe: pipe.step(),
    "resize": lambda pipe: pipe.resize(1),
    "schedule": lambda pipe: setattr(pipe, "schedule", "gpipe"),
    "chunks": lambda pipe: setattr(pipe, "chunks", 3),
    "trained": lambda pipe: setattr(pipe, "trained", 3),
    "nonfinite": lambda pipe: setattr(pipe, "nonfinite", "stop"),
    "call": lambda pipe: pipe.stages[0].call(len),
    "rref": lambda pipe: pipe.stages[0].rref,
    "generate": lambda pipe: rp.generate(pipe, torch.zeros(1, 2).long(), 1),
    "verify": lambda pipe: rp.verify(pipe, *BATCH),
    "close": lambda pipe: pipe.close(),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_call_that_waits_too_long_for_anothers_is_refused_by_name(schedule: str, others: ThreadPoolExecutor) -> None:
    cluster: Any = LocalCluster(2, timeout=0.05)
    pipe = pipeline(schedule, cluster)
    gate, step = in_a_step(pipe, others)
    for name, call in OTHERS.items():
        message = rf"pipe.{name} in thread 'MainThread' has waited 0.05 s for pipe.train_step in thread 'other_0'"
        with pytest.raises(rp.StateError, match=re.escape(message).replace(r"\ ", " ")):
            call(pipe)
    gate.opened.set()
    result = step.result(SECONDS)
    pipe.callbacks.clear()
    fresh = pipeline(schedule)
    assert result.loss == fresh.train_step(*BATCH).loss
    assert pipe.train_step(*BATCH).loss == fresh.train_step(*BATCH).loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_calls_of_several_threads_take_turns(schedule: str, others: ThreadPoolExecutor) -> None:
    pipe, fresh = pipeline(schedule), pipeline(schedule)
    losses = at_once(others, pipe, BATCH, SECONDS)  # all have ended: fresh uses the same generator in this process
    assert set(losses) == {fresh.train_step(*BATCH).loss for _ in range(4)}
    assert pipe.train_step(*BATCH).loss == fresh.train_step(*BATCH).loss


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ahead", [0, 1])
def test_between_the_results_of_train_other_threads_have_their_turn(
    schedule: str, ahead: int, others: ThreadPoolExecutor
) -> None:
    pipe, fresh = pipeline(schedule), pipeline(schedule)
    wanted = []
    for batch in batches(5):
        wanted.append(fresh.train_step(*batch).loss)
    losses = []
    for result in pipe.train(batches(5), ahead=ahead):
        losses.append(result.loss)
        others.submit(pipe.evaluate, [BATCH]).result(SECONDS)  # drains a stream, takes a step ahead back
    if schedule == "1f1b":
        assert losses == wanted
    assert pipe.trained == fresh.trained


def test_a_callback_may_call_the_pipeline(others: ThreadPoolExecutor) -> None:
    pipe = pipeline()
    pipe.on_step(lambda result: pipe.evaluate([BATCH]))
    assert_as_new(pipe)


def test_a_pipeline_may_be_closed_by_another_thread_between_two_steps(others: ThreadPoolExecutor) -> None:
    pipe = pipeline()
    training = pipe.train(batches(3))
    next(training)
    others.submit(pipe.close).result(SECONDS)
    with pytest.raises(rp.StateError, match="the pipeline is closed"):
        next(training)


def test_a_step_by_hand_is_refused_to_other_threads_by_name(others: ThreadPoolExecutor) -> None:
    pipe = pipeline()
    with pipe.step() as step:
        with pytest.raises(rp.StateError, match="since thread 'MainThread' entered it"):
            others.submit(pipe.train_step, *BATCH).result(SECONDS)
        with pytest.raises(rp.StateError, match="'MainThread' entered this step and thread 'other_0' runs it"):
            others.submit(step.forward_backward, *BATCH).result(SECONDS)
        step.forward_backward(*BATCH)
        others.submit(pipe.state_dict).result(SECONDS)
        step.optimize()
    fresh = pipeline()
    fresh.train_step(*BATCH)
    assert pipe.train_step(*BATCH).loss == fresh.train_step(*BATCH).loss


def test_a_forgotten_step_is_rolled_back() -> None:
    pipe = pipeline()
    pipe.step().__enter__()
    assert_as_new(pipe)
    pipe = pipeline()
    pipe.step().__enter__().forward_backward(*BATCH)
    assert_as_new(pipe)
    pipe = pipeline()
    step = pipe.step().__enter__()
    step.forward_backward(*BATCH)
    step.optimize()
    with pytest.raises(rp.StateError, match=r"at a prompt, step.__exit__\(None, None, None\)"):
        pipe.train_step(*BATCH)
    del step
    assert_as_new(pipe)


def test_a_step_of_one_pipeline_inside_of_anothers() -> None:
    outer, inner = pipeline(), pipeline()
    with outer.step() as step:
        assert_as_new(inner)
        step.forward_backward(*BATCH)
        step.optimize()
    fresh = pipeline()
    fresh.train_step(*BATCH)
    assert outer.train_step(*BATCH).loss == fresh.train_step(*BATCH).loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_that_is_never_iterated_over_warns(schedule: str) -> None:
    pipe = pipeline(schedule)
    with pytest.warns(RuntimeWarning, match="never iterated over, so nothing was trained"):
        pipe.train(batches(2))
    assert_as_new(pipe)
