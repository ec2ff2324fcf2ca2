"""``rp.predict_memory``: what workers would hold, of any schedule, and whether they do."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.planning.loss_cost import snapshot_bytes
from support.mortal_hosts import MortalHosts

LAYERS = [rp.LayerSpec(nn.Linear, 32, 32, bias=False) for _ in range(4)]
SIZE = 4 * 32 * 32  # bytes of a layer's weights
X = torch.zeros(8, 32)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters)


def test_it_is_what_a_plan_says_of_the_same_choice() -> None:
    plan = rp.plan(LAYERS, X, 2, flops=1e9, chunks=[4], schedules=["gpipe"], checkpoints=["always"], hosts=2)
    chosen = {"schedule": "gpipe", "checkpoint": "always", "chunks": 4, "balance": plan.balance}
    assert rp.predict_memory(LAYERS, X, 2, flops=1e9, hosts=2, **chosen) == plan.parts  # type: ignore[arg-type]
    assert plan.parts[0].snapshots == 2 * 2 * 3 * plan.parts[0].weights


def test_it_knows_the_schedules_that_no_plan_chooses() -> None:
    first, last = rp.predict_memory(LAYERS, X, 2, flops=1e9, schedule="pipedream", chunks=4)
    assert (first.weights, first.copy, last.copy) == (2 * SIZE, 2 * 3 * 2 * SIZE, 2 * 3 * 2 * SIZE)
    assert (first.versions, last.versions) == ((1 + 2 + 1) * 2 * SIZE, 0)
    first, last = rp.predict_memory(LAYERS, X, 2, flops=1e9, schedule="pipedream", weights="latest", balance=[1, 3])
    assert (first.weights, first.versions, last.versions) == (SIZE, 2 * SIZE, 0)
    first, last = rp.predict_memory(LAYERS, X, 4, flops=1e9, replicas=2, shard_optimizer=True, chunks=2, undo="off")
    assert (first.optimizer, first.copy, first.versions) == (2 * SIZE, 0, 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"schedule": "zigzag"}, "unknown schedule"),
        ({"schedule": "pipedream", "undo": "off"}, "needs undo='copy' and replicas=1"),
        ({"weights": "stash"}, "does not fit schedule '1f1b'"),
        ({"checkpoint": 0.5}, "checkpoint must be one of"),
        ({"undo": "maybe"}, "undo must be one of"),
        ({"replicas": 3}, "2 workers make no 3 replicas"),
        ({"balance": [1, 1]}, "4 layers"),
        ({"hosts": 3}, "hosts must be at most 2"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(rp.RpcPipeError, match=words):
        rp.predict_memory(LAYERS, X, 2, flops=1e9, **wrong)  # type: ignore[arg-type]


def snapshots_in_memory() -> int:
    """Return the bytes that the snapshots of all workers, which are threads here, take in memory."""
    sizes = {}  # by file, which several descriptors may have open
    for name in os.listdir("/proc/self/fd"):
        try:
            if "rpcpipe-snapshot" in os.readlink(f"/proc/self/fd/{name}"):
                status = os.fstat(int(name))
                sizes[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:  # the folder's own
            continue
    return sum(sizes.values())


def test_snapshots_take_what_is_predicted_while_the_next_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(256, 256, bias=False) for _ in range(4)]
    cluster, most = MortalHosts(2, 0), 0
    pipe = rp.Pipeline(nn.Sequential(*layers), cluster, loss=nn.functional.mse_loss, optimizer=adam, chunks=2)
    snapshots, x = pipe.runtime.history._snapshots, torch.zeros(4, 256)
    settle, before = snapshots.settle, snapshots_in_memory()

    def settling() -> bool:
        nonlocal most
        most = max(most, snapshots_in_memory() - before)
        return settle()

    monkeypatch.setattr(snapshots, "settle", settling)
    for _ in range(6):
        pipe.train_step(x, x)
        pipe.runtime.history._next = 0.0  # the next is due at once
    state = [3 * 2 * 4 * 256 * 256] * 2  # weights and two moments
    assert sum(snapshot_bytes(state, ["a", "b"])) <= most <= 1.1 * sum(snapshot_bytes(state, ["a", "b"]))
    pipe.close()
