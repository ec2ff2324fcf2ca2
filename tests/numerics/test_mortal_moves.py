"""Workers die while layers move between them, and the schedule is changed as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd
from support.mortal_cluster import MortalCluster

# The schedules by turns, a step after each, and the pipeline's options.
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "other stages": (["interleaved", "1f1b", "zb-v", "gpipe"], {"optimizer": adamw}),
    "with statistics": (["zb-v", "1f1b", "interleaved"], {"optimizer": sgd, "norm": True}),
    "amid an accumulation": (["interleaved", "1f1b", "zb-v"], {"optimizer": adamw, "accumulate": 3}),
    "in replicas": (["interleaved", "1f1b"], {"optimizer": adamw, "replicas": 2}),
    "sharded": (["zb-v", "1f1b"], {"optimizer": adamw, "replicas": 2, "shard_optimizer": True}),
    "in and out of a stream": (["pipedream", "interleaved", "pipedream", "zb-v"], {"optimizer": adamw}),
}


def model(*, norm: bool) -> nn.Sequential:
    layers = list(mlp())
    return nn.Sequential(*layers[:4], nn.BatchNorm1d(12), *layers[4:]) if norm else nn.Sequential(*layers)


def run(cluster: Any, case: str) -> tuple[str, dict[str, Any], int]:
    """What a run shows, the state at its end, and how many turns of the transport a change of the schedule takes."""
    names, options = CASES[case]
    given: dict[str, Any] = {"loss": cross_entropy, "chunks": 4} | options
    layers = model(norm=given.pop("norm", False))
    pipe = rp.Pipeline(layers, cluster, schedule="1f1b", **given)
    seen: list[Any] = []
    data, taken = batches(2 * len(names) + 1, 12), 0
    seen.append(pipe.train_step(*next(data)).loss)
    for name in names:
        before = cluster.transport.turns
        cluster.deadly = True
        pipe.schedule = name
        cluster.deadly = False
        taken += cluster.transport.turns - before
        seen += [pipe.schedule.name, pipe.balance, [stage.layers for stage in pipe.stages]]
        for _ in range(2):
            result = pipe.train_step(*next(data))
            seen.append((result.step, result.loss, result.grad_norm, result.applied))
    state = dict(pipe.state_dict())
    pipe.close()
    return repr(seen), state, taken // len(names)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(120)
def test_a_changed_schedule_gives_the_bits_of_a_change_without_deaths(case: str) -> None:
    workers, died = 2 * CASES[case][1].get("replicas", 1), 0
    shown, state, turns = run(LocalCluster(workers, 1), case)
    for seed in range(4):
        cluster = MortalCluster(workers, seed, rarity=turns)
        again, after, _ = run(cluster, case)
        assert again == shown
        assert state.keys() == after.keys()
        for name, value in state.items():
            assert torch.equal(after[name], value)
        died += cluster.deaths
    assert died > 4
