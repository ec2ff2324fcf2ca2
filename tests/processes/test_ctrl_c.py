"""Ctrl-C at any moment: at the driver within 0.3 s, and nothing torn."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import rpcpipe as rp
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Oracle, Versioned, assert_same_weights, train

pytestmark = pytest.mark.alone


@contextmanager
def interrupted_after(seconds: float) -> Iterator[list[float]]:
    """Ctrl-C once ``seconds`` have passed, from a process that no lock of this one can hold up."""
    sent: list[float] = []

    def strike() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, strike)
    timer.start()
    try:
        yield sent
        timer.join()  # if it has not struck yet: here, inside of the caller's `raises`
        time.sleep(0)
    finally:
        timer.cancel()


def seconds_of(call: Callable[[], object]) -> float:
    """Median of a few runs: machines differ, and so does one machine from hour to hour."""
    found = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def beside_oracle(
    cluster: rp.Cluster, dispatch: str
) -> tuple[rp.Pipeline, Oracle, list[tuple[torch.Tensor, torch.Tensor]], float]:
    """Return a pipeline and an oracle after the same steps, batches, and the seconds that a step takes."""
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=4, dispatch=dispatch)
    oracle = Oracle(mlp(), adamw, cross_entropy, 4)
    data = list(batches(4))
    seconds = seconds_of(lambda: pipe.train_step(*data[0]))
    for _ in range(pipe.trained):
        oracle.train_step(*data[0])
    return pipe, oracle, data, seconds


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
def test_steps_interrupted_at_random_are_done_or_not_done(cluster: rp.Cluster, dispatch: str) -> None:
    """``pipe.trained`` says which steps count; replayed without interrupts they give the same bits."""
    source = random.Random(1)
    pipe, oracle, data, seconds = beside_oracle(cluster, dispatch)
    longest = 2 * seconds
    torn, done = 0, pipe.trained
    for attempt in range(80):
        batch, before = data[attempt % 4], pipe.trained
        try:
            with interrupted_after(source.uniform(0.0, longest)):
                pipe.train_step(*batch)
        except KeyboardInterrupt:
            torn += pipe.trained == before
        assert pipe.trained - before in (0, 1)
        if pipe.trained > before:
            oracle.train_step(*batch)
    assert torn > 10
    assert pipe.trained == oracle.step > done
    assert_same_weights(pipe, oracle.model)
    pipe.close()


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
def test_steps_ahead_interrupted_at_random_are_done_or_not_done(cluster: rp.Cluster, dispatch: str) -> None:
    source = random.Random(2)
    pipe, oracle, data, seconds = beside_oracle(cluster, dispatch)
    longest = 4 * seconds
    torn = 0
    for attempt in range(60):
        batch, before = data[attempt % 4], pipe.trained
        try:
            with interrupted_after(source.uniform(0.0, longest)):
                for _ in pipe.train([batch] * 3, ahead=1):
                    pass
        except KeyboardInterrupt:
            torn += pipe.trained < before + 3
        assert 0 <= pipe.trained - before <= 3
        for _ in range(pipe.trained - before):
            oracle.train_step(*batch)
    assert torn > 10
    assert pipe.trained == oracle.step
    assert_same_weights(pipe, oracle.model)
    pipe.close()


class Slow(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.9)  # a long action
        return super().forward(x)


@pytest.mark.parametrize("where", ["train_step", "call", "evaluate", "state_dict"])
def test_a_long_wait_ends_at_once(cluster: rp.Cluster, where: str) -> None:
    pipe = rp.Pipeline(
        [Slow(), *[torch.nn.Linear(12, 12) for _ in range(3)]], cluster, optimizer=adamw, chunks=1,
        loss=cross_entropy,
    )  # fmt: skip
    before = pipe.state_dict()
    batch = next(batches(1))
    actions = {
        "train_step": lambda: pipe.train_step(*batch),
        "call": lambda: cluster.call(1, time.sleep, 0.9),
        "evaluate": lambda: pipe.evaluate([batch]),
        "state_dict": lambda: (pipe.stages[0].call(lambda module: time.sleep(0.9)), pipe.state_dict()),
    }
    with interrupted_after(0.3) as sent, pytest.raises(KeyboardInterrupt):
        actions[where]()
    assert time.monotonic() - sent[0] < 0.3
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    assert pipe.train_step(*batch).applied
    pipe.close()


SCRIPT = textwrap.dedent("""
    import os, signal, sys, threading, time
    import rpcpipe as rp
    sent = []
    def strike():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    slowest, interrupted = 0.0, 0
    # The template starts during the first ones; a later launch takes some 0.04 s.
    for delay in (0.0, 0.02, 0.1, 0.3, 0.5, *[0.002 * tick for tick in range(30)]):
        timer = threading.Timer(delay, strike)
        try:
            timer.start()
            cluster = rp.launch(workers=2, threads=1)
            timer.cancel()
            timer.join()
            cluster.close()
        except KeyboardInterrupt:
            slowest = max(slowest, time.monotonic() - sent[-1])
            interrupted += 1
    cluster = rp.launch(workers=2, threads=1)
    print(slowest, interrupted, *[cluster.call(rank, os.getpid) > 0 for rank in (1, 2)])
""")


def test_a_launch_is_interrupted_at_any_moment() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    slowest, interrupted, *alive = done.stdout.split()
    assert alive == ["True", "True"]
    assert int(interrupted) >= 5
    assert float(slowest) < 0.3


def test_a_stream_interrupted_at_random_has_done_what_it_was_fed(cluster: rp.Cluster) -> None:
    """The next call waits for that; replayed without interrupts the versions give the same bits."""
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=adamw, schedule="pipedream", chunks=1,
                       balance=[2, 2, 2, 2])  # fmt: skip
    oracle = Versioned(mlp(), adamw, cross_entropy, [2, 2, 2, 2])
    draw, data, used = random.Random(3), list(batches(200)), 0
    for _ in range(25):
        with pytest.raises(KeyboardInterrupt), interrupted_after(draw.uniform(0.0, 0.1)) as sent:
            for _ in pipe.train(data[used:] * 100):
                pass
        assert time.monotonic() - sent[0] < 0.3
        pipe.state_dict()
        train(oracle, (data[used:] * 100)[: pipe.trained - oracle.updates], "stash", 4, 1)
        oracle.flush()
        assert_same_weights(pipe, oracle.model)
        used = oracle.updates % len(data)
    assert oracle.updates > 50
    pipe.close()
