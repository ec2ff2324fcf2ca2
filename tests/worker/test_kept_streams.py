"""What is left of a stream, whatever update the worker dies in."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.stage import stream_rollback
from rpcpipe.stage.kept_memory import Condition, look
from rpcpipe.stage.optimizer import LocalOptimizer
from rpcpipe.worker.operations import EndStream
from support.local_cluster import LocalCluster
from support.models import batches
from support.solo import Solo, copy_of, forget
from support.stream import POLICIES, pipeline

UPDATES = 7
WORKER = "worker0"


@pytest.mark.parametrize("policy", [*POLICIES, "latest"])
def test_a_successor_goes_on_from_each_snapshot_that_others_may_go_back_to(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_rollback, "EVERY", 2)
    pipe = pipeline(2, policy, LocalCluster(2, 2, heal=1))
    pipe.train_step(*next(batches(1)))
    [actor] = pipe_actor(pipe)
    streams = list[int]()
    mine, copies, states = actor.held.optimizer, list[tuple[int, list[int], str]](), list[bytes]()
    worker = Solo(actor, None)  # type: ignore[arg-type]
    apply = LocalOptimizer.apply

    def watched(self: LocalOptimizer, *arguments: Any) -> None:
        if self is mine:
            streams[:] = [actor.stream.snapshots.stream]
            states.append(state_of(self))
            copies.append((len(states) - 1, list(actor.stream.snapshots.slots), copy_of(worker.path)))
        apply(self, *arguments)
        if self is mine:
            copies.append((len(states) - 1, list(actor.stream.snapshots.slots), copy_of(worker.path)))

    monkeypatch.setattr(LocalOptimizer, "apply", watched)
    list(pipe.train(batches(UPDATES)))
    monkeypatch.undo()
    assert {tuple(slots) for _, slots, _ in copies} > {(0,), (0, 2)}
    for _, slots, copy in copies:
        for number in slots:
            again = copy_of(copy)
            successor = Solo.revived(again)
            forget(again)
            successor.execute(EndStream(streams[0], number))
            optimizer = successor.actor.held.optimizer
            assert optimizer is not None
            assert state_of(optimizer) == states[number]
            kept_at = successor.actor.held.kept_at
            assert kept_at is not None
            assert look(kept_at.descriptor).condition is Condition.KEPT
        forget(copy)


def pipe_actor(pipe: Any, worker: str = WORKER) -> list[Any]:
    """The pipeline's actor on ``worker``."""
    return list(pipe.cluster.transport.endpoints[worker].actors.values())


def state_of(optimizer: LocalOptimizer) -> bytes:
    """Weights and momenta."""
    tensors = [p.detach() for p in optimizer.parameters]
    state = [optimizer.optimizer.state.get(p, {}).get("momentum_buffer") for p in optimizer.parameters]
    return b"".join(t.numpy().tobytes() for t in (*tensors, *(t for t in state if isinstance(t, torch.Tensor))))


def test_a_streams_copies_are_two_however_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stage's older versions are none, so the memory has its weights and moments thrice, and little else."""
    monkeypatch.setattr(stream_rollback, "EVERY", 8)  # more than are under way
    layers = [nn.Linear(256, 256, bias=False) for _ in range(4)]
    pipe = rp.Pipeline(
        nn.Sequential(*layers), LocalCluster(2, 2, heal=1), loss=nn.functional.mse_loss, chunks=1, schedule="pipedream",
        optimizer=lambda parameters: torch.optim.Adam(parameters),
    )  # fmt: skip
    x = torch.zeros(4, 256)
    list(pipe.train([(x, x)] * 40))
    kept_at = pipe_actor(pipe, "worker1")[0].held.kept_at
    assert kept_at is not None
    state = 3 * 2 * 4 * 256 * 256
    assert 3 * state <= os.fstat(kept_at.descriptor).st_blocks * 512 <= 3.2 * state
