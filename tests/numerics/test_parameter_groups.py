"""Parameter groups, and torch's learning-rate schedulers on them: the bits of a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import rpcpipe as rp
from rpcpipe.stage.optimizer import Parameters
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd
from support.oracle import Natural, assert_same_run, assert_same_weights


def normed() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12)), nn.GELU(), nn.Linear(12, 12, bias=False),
        nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 4)),
    )  # fmt: skip


def by_dimension(params: Any) -> torch.optim.Optimizer:
    decay, none = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": none, "weight_decay": 0.0}], lr=0.01)


def by_name(params: Any) -> torch.optim.Optimizer:
    decay = [p for name, p in params.named() if name.endswith("weight") and p.ndim > 1]
    none = [p for name, p in params.named() if not (name.endswith("weight") and p.ndim > 1)]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": none, "weight_decay": 0.0}], lr=0.01)


@pytest.mark.parametrize("factory", [by_dimension, by_name])
@pytest.mark.parametrize("where", ["local", "rpc"])
def test_no_decay_for_biases_and_norms(where: str, factory: Any, request: pytest.FixtureRequest) -> None:
    """A stage may have no parameter for a group, or none at all; groups keep their own rates."""
    cluster = request.getfixturevalue("cluster") if where == "rpc" else LocalCluster(4)
    pipe = rp.Pipeline(normed(), cluster, loss=cross_entropy, optimizer=factory, chunks=3, balance=[1, 1, 1, 1])
    loop = Natural(normed(), by_dimension, cross_entropy, 3)
    for batch in batches(3):
        for optimizer in (pipe.optimizer, loop.optimizer):
            assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
            optimizer.param_groups[1]["lr"] *= 0.5
        assert_same_run(pipe, loop, iter([batch]))
    plain = Natural(normed(), adamw, cross_entropy, 3)
    for batch in batches(3):
        plain.train_step(*batch)
    assert not torch.equal(plain.model.state_dict()["2.weight"], pipe.state_dict()["2.weight"])
    pipe.close()


def test_names_are_the_unsplit_models() -> None:
    def note(params: Parameters) -> torch.optim.Optimizer:
        assert [p for _, p in params.named()] == list(params)
        return torch.optim.SGD(params.named(), lr=0.1)  # torch takes named parameters as they are

    model = normed()
    model[0].requires_grad_(False)
    cluster = LocalCluster(2)
    pipe = rp.Pipeline(model, cluster, loss=cross_entropy, optimizer=note, balance=[2, 2])
    actors = [actor for executor in cluster.transport.endpoints.values() for actor in executor.actors.values()]
    made = [actor.held.optimizer for actor in actors]
    names = [name for local in made if local is not None for name in local.optimizer.param_groups[0]["param_names"]]
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]
    assert "param_names" not in pipe.optimizer.param_groups[0]
    assert pipe.train_step(*next(batches(1))).applied


# --- torch's schedulers ---

SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one cycle, momentum": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=14),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, T_max=9)], milestones=[3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.2),
}


@pytest.mark.filterwarnings("ignore:Detected call")  # the plain loop's, where GradScaler skips the first step
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_unchanged_with_skipped_steps_and_accumulation(name: str, make: Any) -> None:
    """Under float16 from a scale that overflows; the scheduler is stepped once an update, applied or not."""

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)

    arguments = {"accumulate": 2, "autocast": torch.float16, "clip_grad_norm": 0.5}
    pipe = rp.Pipeline(mlp(), LocalCluster(3), loss=cross_entropy, optimizer=make, chunks=3, **arguments)  # type: ignore[arg-type]
    assert pipe.scaler is not None
    pipe.scaler.load_state_dict(scaler().state_dict())
    loop = Natural(mlp(), make, cross_entropy, 3, accumulate=2, autocast=torch.float16, clip=0.5, scaler=scaler())
    mine, other = (SCHEDULERS[name](optimizer) for optimizer in (pipe.optimizer, loop.optimizer))
    rates, applied = set(), set()
    for batch in batches(20):
        [result] = assert_same_run(pipe, loop, iter([batch]))
        if not result.accumulated:
            applied.add(result.applied)
            for scheduler in (mine, other):
                scheduler.step(*([result.loss] if name == "plateau" else []))
        for group, expected in zip(pipe.optimizer.param_groups, loop.optimizer.param_groups, strict=True):
            wanted = {key: value for key, value in expected.items() if key != "params"}
            assert {key: value for key, value in group.items() if key != "params"} == wanted
        rates.add(pipe.optimizer.param_groups[0]["lr"])
    assert applied == {True, False}
    assert len(rates) > 2
    assert_same_weights(pipe, loop.model)
