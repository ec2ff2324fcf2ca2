"""Save and load: the same bits on any cut, in any schedule, with any number of replicas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import OPTIMIZERS, adamw, batches, cross_entropy, mlp
from support.oracle import Oracle, Versioned, assert_same_weights, train
from support.saving import STEPS, assert_same_state, make, one_cycle


def oracle_after(steps: int, optimizer: Any) -> tuple[Oracle, list[float]]:
    oracle = Oracle(mlp(), optimizer, cross_entropy, 4, seed=7, clip=0.5)
    scheduler, losses = one_cycle(oracle.optimizer), []
    for batch in list(batches(steps)):
        losses.append(oracle.train_step(*batch))
        scheduler.step()
    return oracle, losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("workers", "arguments"),
    [
        (1, {"schedule": "naive"}),
        (2, {"schedule": "gpipe", "dispatch": "batched"}),
        (2, {"schedule": "interleaved", "virtual_stages": 2}),
        (4, {"schedule": "1f1b", "checkpoint": "always"}),
        (4, {"schedule": "zb-v", "seed": 99}),
    ],
    ids=lambda value: value.get("schedule") if isinstance(value, dict) else str(value),
)
def test_another_pipeline_goes_on_with_the_same_bits(
    tmp_path: Path, optimizer: str, workers: int, arguments: dict[str, Any]
) -> None:
    factory, data = OPTIMIZERS[optimizer], list(batches(2 * STEPS))
    oracle, expected = oracle_after(2 * STEPS, factory)
    pipe = make(3, factory)
    scheduler, losses = one_cycle(pipe.optimizer), []
    for result in pipe.train(data[:STEPS]):
        losses.append(result.loss)
        scheduler.step()
    pipe.save(tmp_path, stateful={"lr": scheduler}, position={"epoch": 1, "batch": STEPS})

    other = make(workers, factory, **arguments)
    scheduler = one_cycle(other.optimizer)
    other.train_step(*data[0])  # what it did before is forgotten
    position = other.load(tmp_path, stateful={"lr": scheduler})
    assert (position, other.trained) == ({"epoch": 1, "batch": STEPS}, STEPS)
    for result in other.train(data[position["batch"] :]):
        losses.append(result.loss)
        scheduler.step()
    assert losses == expected
    assert_same_weights(other, oracle.model)


# --- streams ---


class Loader:
    """Batches, with the number of those that were taken as its state."""

    def __init__(self, data: list[Any]) -> None:
        self.data, self.taken = data, 0

    def __iter__(self) -> Iterator[Any]:
        while self.taken < len(self.data):
            self.taken += 1
            yield self.data[self.taken - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


@pytest.mark.parametrize(("schedule", "policy"), [("pipedream", "stash"), ("pipedream-2bw", "2bw")])
def test_a_stream_drains_and_goes_on_by_the_definitions(tmp_path: Path, schedule: str, policy: str) -> None:
    """As an uninterrupted run that flushes where the other one saved."""
    data, chunks = list(batches(12)), {"stash": 2, "2bw": 4}[policy]
    cut = {2: [4, 4], 4: [2, 2, 2, 2]}

    def pipeline(workers: int) -> rp.Pipeline:
        return make(workers, schedule=schedule, chunks=chunks, balance=cut[workers], clip_grad_norm=None)

    pipe, loader = pipeline(4), Loader(data)
    for number, _ in enumerate(pipe.train(loader), 1):
        if number == 3:
            pipe.save(tmp_path, stateful={"loader": loader})
            break
    other, loader = pipeline(2), Loader(data)
    other.load(tmp_path, stateful={"loader": loader})
    fed = loader.taken
    assert fed > number  # some were on their way, and are in the checkpoint
    assert other.trained == fed * (chunks if policy == "stash" else 1)
    for _ in other.train(loader):
        pass
    oracle = Versioned(mlp(), adamw, cross_entropy, cut[4], seed=7)
    train(oracle, data[:fed], policy, 4, chunks)
    oracle.flush()
    oracle.stage_of = [stage for stage, size in enumerate(cut[2]) for _ in range(size)]
    train(oracle, data[fed:], policy, 2, chunks)
    assert_same_weights(other, oracle.model)


# --- what a pipeline may hold ---


class Odd(nn.Module):
    """Frozen and shared parameters, half precision, buffers of other types, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 12)
        self.other = nn.Linear(12, 12)
        self.other.weight = self.one.weight
        self.frozen = nn.Parameter(torch.randn(12), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3, 2).t())
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mask", torch.ones(2, 6, dtype=torch.bool)[:, ::2])
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.low = nn.Linear(12, 12).bfloat16()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.norm(self.other(self.one(x)) + self.frozen)
        return x + self.low(x.bfloat16()).float()


def odd_pipeline(workers: int) -> rp.Pipeline:
    torch.manual_seed(3)
    layers = [Odd(), nn.Dropout(0.2), Odd(), nn.Linear(12, 4)]
    balance = {1: [4], 4: [1, 1, 1, 1]}[workers]
    return rp.Pipeline(layers, LocalCluster(workers), loss=cross_entropy, optimizer=amsgrad, balance=balance, chunks=2)


def amsgrad(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    decay = [p for p in params if p.ndim > 1]
    rest = [p for p in params if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.01, amsgrad=True)


@pytest.mark.parametrize(("workers", "others"), [(1, 4), (4, 1)])
def test_odd_models_go_on(tmp_path: Path, workers: int, others: int) -> None:
    data = list(batches(6))
    straight, pipe, other = odd_pipeline(workers), odd_pipeline(workers), odd_pipeline(others)
    for batch in data[:3]:
        straight.train_step(*batch)
        pipe.train_step(*batch)
    pipe.save(tmp_path)
    other.load(tmp_path)
    for batch in data[3:]:
        assert other.train_step(*batch).loss == straight.train_step(*batch).loss
    found = other.state_dict()
    for name, value in straight.state_dict().items():
        assert torch.equal(found[name], value), name
    assert found["0.calls"] == 12


def test_saved_before_the_first_step_and_without_anything_to_train_on_a_worker(tmp_path: Path) -> None:
    pipe, other = odd_pipeline(4), odd_pipeline(4)
    pipe.save(tmp_path)
    other.train_step(*next(batches(1)))
    assert other.load(tmp_path) is None
    batch = next(batches(1))
    assert other.train_step(*batch).loss == pipe.train_step(*batch).loss
    assert_same_state(other, pipe)


def test_hyperparameters_that_only_some_workers_have_stay_the_factorys(tmp_path: Path) -> None:
    """A group's rate may be a function of the parameters that a worker happens to hold."""

    def by_size(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1 / len(params), momentum=0.9)

    def pipeline() -> rp.Pipeline:
        return rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=by_size, balance=[6, 2], chunks=2)

    pipe, other, data = pipeline(), pipeline(), list(batches(4))
    pipe.optimizer.param_groups[0]["momentum"] = 0.5
    pipe.train_step(*data[0])
    pipe.save(tmp_path)
    other.load(tmp_path)
    assert other.optimizer.param_groups[0]["momentum"] == 0.5
    for batch in data[1:]:
        assert other.train_step(*batch).loss == pipe.train_step(*batch).loss


def tied_pipeline(workers: int, **arguments: Any) -> rp.Pipeline:
    """The first and the last layer share their weight."""
    torch.manual_seed(5)
    layers = [nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.1)), nn.GELU(), nn.Linear(12, 12)]
    layers[3].weight = layers[0].weight
    arguments = {"chunks": 4, "balance": {1: [4], 2: [2, 2], 4: [1, 1, 1, 1]}[workers]} | arguments
    cluster: Any = LocalCluster(workers * arguments.get("replicas", 1))
    return rp.Pipeline(layers, cluster, loss=cross_entropy, optimizer=adamw, **arguments)


@pytest.mark.parametrize(("one", "other"), [(1, 4), (4, 1), (2, 4)])
@pytest.mark.parametrize("sharded", [{}, {"replicas": 2, "shard_optimizer": True, "chunks": 2}], ids=["", "sharded"])
def test_tied_weights_go_on_by_whichever_name(tmp_path: Path, one: int, other: int, sharded: dict[str, Any]) -> None:
    """There and back: how their gradients are summed depends on the cut, so another cut gives other bits."""
    data = list(batches(5, 8))
    straight, between, after = tied_pipeline(one, **sharded), tied_pipeline(other), tied_pipeline(one, **sharded)
    for batch in data[:3]:
        straight.train_step(*batch)
    between.load(straight.save(tmp_path))
    assert_same_state(between, straight)
    after.load(between.save(tmp_path))
    for batch in data[3:]:
        straight.train_step(*batch)
        after.train_step(*batch)
    assert_same_state(after, straight)


def test_the_loss_scale_goes_on(tmp_path: Path) -> None:
    pipe, other = make(2, autocast=torch.float16), make(1, autocast=torch.float16)
    assert pipe.scaler is not None
    assert other.scaler is not None
    pipe.scaler.load_state_dict(pipe.scaler.state_dict() | {"scale": 64.0})
    for batch in batches(2):
        pipe.train_step(*batch)
    pipe.save(tmp_path)
    other.load(tmp_path)
    assert other.scaler.state_dict() == pipe.scaler.state_dict()
    assert other.scaler.get_scale() == 64.0
    assert pipe.scaler.state_dict()["_growth_tracker"] == 2
    make(2).load(tmp_path)  # in another precision there is no scale


def test_between_the_calls_of_an_accumulation_nothing_is_saved_and_what_is_loaded_begins_anew(tmp_path: Path) -> None:
    data = list(batches(5))
    pipe, straight = make(2, accumulate=2), make(2, accumulate=2)
    pipe.save(tmp_path)
    for batch in data[:3]:
        pipe.train_step(*batch)
    with pytest.raises(
        rp.StateError, match="1 of 2 calls of an accumulation are done: save after the one that updates"
    ):
        pipe.save(tmp_path)
    pipe.load(tmp_path)
    for batch in data[:4]:
        assert pipe.train_step(*batch).loss == straight.train_step(*batch).loss
    assert_same_state(pipe, straight)
    pipe.save(tmp_path)


# --- replicas ---


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replicas_and_sharded_optimizers_go_on(tmp_path: Path, optimizer: str, shard: bool) -> None:
    factory, data = OPTIMIZERS[optimizer], list(batches(6, 8))

    def pipeline(workers: int, replicas: int, shard: bool) -> rp.Pipeline:
        """The same micro-batches in the same order, whatever the number of replicas."""
        return make(workers, factory, replicas=replicas, shard_optimizer=shard, chunks=4 // replicas)

    straight, pipe = pipeline(4, 2, shard), pipeline(4, 2, shard)
    alone, longer = pipeline(2, 1, False), pipeline(6, 2, not shard)
    for batch in data[:3]:
        straight.train_step(*batch)
        pipe.train_step(*batch)
    folder = pipe.save(tmp_path)
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    assert len(list(folder.glob("optimizer-*.safetensors"))) == (4 if shard else 2)
    for other in (alone, longer):
        other.load(tmp_path)
        assert_same_state(other, pipe)
        for batch in data[3:]:
            other.train_step(*batch)
    for batch in data[3:]:
        straight.train_step(*batch)
    assert_same_state(longer, straight)
    found = alone.state_dict()
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
