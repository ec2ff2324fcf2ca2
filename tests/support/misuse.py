"""A small pipeline to misuse, and the proof that it is as good as new afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd

SCHEDULES = ("1f1b", "pipedream")


def pipeline(schedule: str = "1f1b", cluster: Any = None, **arguments: Any) -> rp.Pipeline:
    arguments = {"loss": cross_entropy, "optimizer": sgd, "chunks": 2} | arguments
    return rp.Pipeline(mlp(4, dropout=0.0), cluster or LocalCluster(2), schedule=schedule, **arguments)


def at_once(threads: ThreadPoolExecutor, pipe: rp.Pipeline, batch: Any, seconds: float) -> list[float]:
    """Have ``threads`` train on ``batch``, evaluate and gather the state, four times each; return the losses of steps.

    All calls have ended then, within ``seconds`` each.
    """
    calls = [
        threads.submit(call)
        for _ in range(4)
        for call in (
            lambda: pipe.train_step(*batch).loss, lambda: pipe.evaluate([batch]), lambda: len(pipe.state_dict()),
        )
    ]  # fmt: skip
    return [call.result(seconds) for call in calls][::3]


def assert_as_new(pipe: rp.Pipeline, **arguments: Any) -> None:
    """Two ordinary steps of ``pipe``, which has trained nothing, have the bits of a pipeline that was never misused."""
    losses, state = _fresh(pipe.schedule.name, **arguments)
    assert [pipe.train_step(*batch).loss for batch in batches(2)] == losses
    assert all(torch.equal(value, state[name]) for name, value in pipe.state_dict().items())


@cache
def _fresh(schedule: str, **arguments: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and weights of two steps of a pipeline that was never misused."""
    fresh = pipeline(schedule, **arguments)
    return [fresh.train_step(*batch).loss for batch in batches(2)], fresh.state_dict()
