"""Without a copy to take an update back from, workers of their own die in an update, and before one; and Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.faults import wait_for
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Oracle, assert_same_weights


@pytest.fixture(scope="module")
def pair() -> Iterator[rp.Cluster]:
    with rp.launch(workers=2, threads=1, timeout=20.0) as made:
        yield made


def strike(process: int, number: int, armed: Path) -> None:
    """Send signal ``number`` to ``process`` if the file ``armed`` is there, once."""
    if armed.exists():
        armed.unlink()
        os.kill(process, number)


class Struck(torch.optim.AdamW):
    """Strikes in the last stage's update, once that of the first stage is done and its own is half done.

    The process that is struck is ``victim``, or this one.
    """

    def __init__(self, params: Any, folder: Path, number: int, victim: int | None) -> None:
        self.first = params.named()[0][0].startswith("0.")
        self.folder, self.number, self.victim = folder, number, victim
        super().__init__(params, lr=1e-2)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        armed, done = self.folder / "armed", self.folder / "first stage"
        if self.first:
            super().step()
            if armed.exists():
                done.touch()
            return
        parameter = self.param_groups[0]["params"][0]
        before = parameter.clone()
        parameter.add_(1.0)
        if armed.exists():
            wait_for(done.exists)
            strike(os.getpid() if self.victim is None else self.victim, self.number, armed)
        parameter.copy_(before)
        super().step()


class Deadly(nn.Linear):
    """Kills its process in its forward if the file ``armed`` is there, once."""

    def __init__(self, armed: Path) -> None:
        super().__init__(4, 4)
        self.armed = armed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        strike(os.getpid(), signal.SIGKILL, self.armed)
        return super().forward(x)


def pipeline(cluster: Any, model: nn.Sequential, optimizer: Callable[[Any], torch.optim.Optimizer]) -> rp.Pipeline:
    return rp.Pipeline(model, cluster, loss=cross_entropy, optimizer=optimizer, chunks=4, undo="off")


def oracle_of(steps: int, model: nn.Sequential) -> Oracle:
    oracle = Oracle(model, adamw, cross_entropy, 4)
    for batch in batches(steps):
        oracle.train_step(*batch)
    return oracle


def test_a_worker_killed_in_an_update_leaves_stages_apart_until_a_checkpoint_is_loaded(
    pair: rp.Cluster, tmp_path: Path
) -> None:
    pipe = pipeline(pair, mlp(), lambda params: Struck(params, tmp_path, signal.SIGKILL, None))
    first, second, third = batches(3)
    pipe.train_step(*first)
    pipe.save(tmp_path / "saved")
    victim, replaced = pair.workers[1].pid, len(pair.events)
    (tmp_path / "armed").touch()
    with pytest.raises(rp.WorkerLost, match=r"(?s)worker1 .*applied on stage 0 \(worker0\); begun") as caught:
        pipe.train_step(*second)
    assert "no weight has changed" not in str(caught.value)
    for call in (
        lambda: pipe.train_step(*second),
        lambda: pipe.save(tmp_path / "torn"),
        lambda: pipe.evaluate([first]),
    ):
        with pytest.raises(rp.StateError, match=r"begun and not ended on stage 1 \(worker1\)"):
            call()  # type: ignore[no-untyped-call]
    pipe.load(tmp_path / "saved")
    for batch in (second, third):
        pipe.train_step(*batch)
    assert_same_weights(pipe, oracle_of(3, mlp()).model)
    assert pair.workers[1].pid != victim
    assert [event.kind for event in pair.events[replaced:] if event.worker == "worker1"] == ["died", "replaced"]
    pipe.close()


def test_a_worker_killed_before_the_update_is_replaced_and_the_step_made_again(
    pair: rp.Cluster, tmp_path: Path
) -> None:
    armed = tmp_path / "armed"

    def model() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(12, 4), nn.GELU(), nn.Linear(4, 4), Deadly(armed))

    pipe, victim = pipeline(pair, model(), adamw), pair.workers[1].pid
    oracle = Oracle(model(), adamw, cross_entropy, 4)
    for number, batch in enumerate(batches(3)):
        expected = oracle.train_step(*batch)
        if number == 1:
            armed.touch()
        assert pipe.train_step(*batch).loss == expected
    assert not armed.exists()
    assert pair.workers[1].pid != victim
    assert_same_weights(pipe, oracle.model)
    pipe.close()


def test_a_ctrl_c_in_an_update_comes_once_the_step_is_done(pair: rp.Cluster, tmp_path: Path) -> None:
    driver = os.getpid()
    pipe = pipeline(pair, mlp(), lambda params: Struck(params, tmp_path, signal.SIGINT, driver))
    first, second, third = batches(3)
    pipe.train_step(*first)
    (tmp_path / "armed").touch()
    with pytest.raises(KeyboardInterrupt):
        pipe.train_step(*second)
    assert pipe.trained == 2
    pipe.train_step(*third)
    assert_same_weights(pipe, oracle_of(3, mlp()).model)
    pipe.close()
