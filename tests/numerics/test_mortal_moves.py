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


def run(case: str, seed: int | None, rarity: int) -> tuple[str, dict[str, Any], int]:
    """What a run shows, the state at its end, and the number of deaths; without deaths where there is no ``seed``."""
    turns, options = CASES[case]
    given: dict[str, Any] = {"loss": cross_entropy, "chunks": 4} | options
    layers = model(norm=given.pop("norm", False))
    workers = 2 * given.get("replicas", 1)
    cluster: Any = LocalCluster(workers, 1) if seed is None else MortalCluster(workers, seed, rarity=rarity)
    pipe = rp.Pipeline(layers, cluster, schedule="1f1b", **given)
    seen: list[Any] = []
    data = batches(2 * len(turns) + 1, 12)
    seen.append(pipe.train_step(*next(data)).loss)
    for name in turns:
        cluster.deadly = True
        pipe.schedule = name
        cluster.deadly = False
        seen += [pipe.schedule.name, pipe.balance, [stage.layers for stage in pipe.stages]]
        for _ in range(2):
            result = pipe.train_step(*next(data))
            seen.append((result.step, result.loss, result.grad_norm, result.applied))
    state = dict(pipe.state_dict())
    pipe.close()
    return repr(seen), state, getattr(cluster, "deaths", 0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(120)
def test_a_changed_schedule_gives_the_bits_of_a_change_without_deaths(case: str) -> None:
    shown, state, _ = run(case, None, 0)
    died = 0
    for seed in range(4):
        again, after, deaths = run(case, seed, 8)
        assert again == shown
        assert state.keys() == after.keys()
        for name, value in state.items():
            assert torch.equal(after[name], value)
        died += deaths
    assert died > 4
