"""Save, load and resume: the same bits on any cut, nothing half done whatever breaks."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.trainer_utils import load_sharded_checkpoint

import rpcpipe as rp
from rpcpipe.checkpoint import directory as checkpoints
from rpcpipe.stage.optimizer import hyperparameters
from support.helpers import (
    OPTIMIZERS,
    LocalCluster,
    Oracle,
    adamw,
    assert_same_weights,
    batches,
    cross_entropy,
    mlp,
    sgd,
)
from support.kills import Kills
from support.versioned import Versioned, train

STEPS = 6


def one_cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=2 * STEPS + 1)


def make(workers: int, optimizer: Any = adamw, **arguments: Any) -> rp.Pipeline:
    arguments = {"chunks": 4, "clip_grad_norm": 0.5, "seed": 7} | arguments
    return rp.Pipeline(mlp(), LocalCluster(workers), loss=cross_entropy, optimizer=optimizer, **arguments)  # type: ignore[arg-type]


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


# --- killed at any moment ---


class Moments:
    """Copies of ``folder`` as it is before each file system call of the block: what a kill there leaves."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = folder, copies
        self.taken: list[Path] = []
        self._active = False

    def __enter__(self) -> Moments:
        self._active = True
        sys.addaudithook(self._hook)  # for ever, so it has a switch
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._active and (event.startswith("os.") or event in ("open", "shutil.rmtree")):
            self._active = False  # copying is made of such calls as well
            copy = self.copies / f"{len(self.taken):04}"
            shutil.copytree(self.folder, copy)
            self.taken.append(copy)
            self._active = True


def test_a_kill_between_any_two_calls_leaves_the_checkpoint_before_or_the_new_one(tmp_path: Path) -> None:
    pipe, directory = make(2), tmp_path / "run"
    states = {}
    for batch in batches(2):
        pipe.train_step(*batch)
        states[pipe.trained] = pipe.state_dict()
        if pipe.trained == 1:
            pipe.save(directory)
    with Moments(directory, tmp_path) as moments:
        pipe.save(directory, keep=1)
    assert len(moments.taken) > 20
    loaded = []
    for left in moments.taken:
        pipe.load(left)
        loaded.append(pipe.trained)
        assert all(torch.equal(value, states[pipe.trained][name]) for name, value in pipe.state_dict().items())
        pipe.save(left, keep=1)
        assert len(list(left.iterdir())) == 1
    assert loaded == sorted(loaded)
    assert set(loaded) == {1, 2}


# --- what is refused, and what is then unchanged ---


@contextmanager
def refused(pipe: rp.Pipeline, match: str, **stateful: Any) -> Iterator[None]:
    """The block's load raises CheckpointError; pipeline and ``stateful`` are as before."""
    before, trained, groups = pipe.state_dict(), pipe.trained, copy.deepcopy(hyperparameters(pipe.optimizer))
    states = {name: copy.deepcopy(holder.state_dict()) for name, holder in stateful.items()}
    with pytest.raises(rp.CheckpointError, match=match):
        yield
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    assert (pipe.trained, hyperparameters(pipe.optimizer)) == (trained, groups)
    assert {name: holder.state_dict() for name, holder in stateful.items()} == states


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of two workers, after two steps."""
    pipe = make(2)
    for batch in batches(2):
        pipe.train_step(*batch)
    return pipe.save(tmp_path)


def edit(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a flipped bit of a weight": (
        "model-00002-of-00002.safetensors",
        lambda file: edit(file, flip_last_bit),
        "worker1 on elsewhere: .*model-00002-of-00002.safetensors: tensor '.*' is damaged",
    ),
    "a truncated file of weights": (
        "model-00001-of-00002.safetensors",
        lambda file: edit(file, lambda content: content[:-9]),
        "model-00001-of-00002.safetensors: tensor '0.0.weight' cannot be read",
    ),
    "a missing file": (
        "optimizer-00002-of-00002.safetensors",
        Path.unlink,
        "optimizer-00002-of-00002.safetensors: tensor '4.0.weight/step' cannot be read: FileNotFoundError",
    ),
    "a flipped bit of the optimizer's state": (
        "optimizer-00001-of-00002.safetensors",
        lambda file: edit(file, flip_last_bit),
        "optimizer-00001-of-00002.safetensors: tensor '.*' is damaged",
    ),
    "another checkpoint's file": (
        "model-00001-of-00002.safetensors",
        lambda file: save_file({"0.0.weight": torch.zeros(2)}, file),
        r"tensor '0.0.weight' is torch.float32 of shape \(2,\) and was saved as torch.float32 of \(12, 12\)",
    ),
    "JSON cut off": ("checkpoint.json", lambda file: edit(file, lambda c: c[:100]), "checkpoint.json cannot be read"),
    "JSON of another kind": ("checkpoint.json", lambda file: file.write_text("[]"), "checkpoint.json cannot be read"),
    "a digit of a number": (
        "checkpoint.json",
        lambda file: edit(file, lambda content: content.replace(b'"lr": 0.01', b'"lr": 0.03')),
        "checkpoint.json is damaged",
    ),
    "a later format": (
        "checkpoint.json",
        lambda file: edit(file, lambda content: content.replace(b'"format": 1', b'"format": 2')),
        "has format 2, this rpcpipe reads 1",
    ),
}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named_and_nothing_changes(saved: Path, damage: str, workers: int) -> None:
    file, strike, message = DAMAGE[damage]
    pipe, data = make(workers), list(batches(4))
    pipe.train_step(*data[0])
    untouched = make(workers)
    untouched.train_step(*data[0])
    strike(saved / file)
    with refused(pipe, message.replace("worker1 on elsewhere: ", "") if workers != 2 else message):
        pipe.load(saved)
    # Nor has anything that shows only later: the optimizer's state.
    for batch in data[1:]:
        assert pipe.train_step(*batch).loss == untouched.train_step(*batch).loss


def pipeline_of(*layers: nn.Module, optimizer: Any = adamw) -> rp.Pipeline:
    return rp.Pipeline(list(layers), LocalCluster(2), loss=cross_entropy, optimizer=optimizer)  # type: ignore[arg-type]


def test_another_model_or_optimizer_is_refused(saved: Path) -> None:
    model = list(mlp())
    cases = [
        (
            (*model[:7], nn.Linear(12, 5)),
            adamw,
            r"tensor '7.weight' is torch.float32 of shape \(4, 12\), the model's is",
        ),
        ((*model[:7], nn.Linear(12, 4).double()), adamw, "tensor '7.weight' is torch.float32 .* is torch.float64"),
        ((*model, nn.Linear(4, 4)), adamw, "is of another model: it lacks '8.weight', '8.bias'"),
        (model[:7], adamw, "is of another model: this one lacks '7.bias', '7.weight'"),
        (model, sgd, "holds the state of AdamW, this pipeline's optimizer is SGD"),
        (
            model,
            lambda params: torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}]),
            "holds 1 parameter groups, this pipeline's optimizer has 2",
        ),
    ]
    for layers, factory, message in cases:
        pipe = pipeline_of(*layers, optimizer=factory)
        with refused(pipe, message):
            pipe.load(saved)


def test_schedulers_are_asked_for_by_name(tmp_path: Path) -> None:
    pipe = make(2)
    scheduler = one_cycle(pipe.optimizer)
    pipe.save(tmp_path, stateful={"lr": scheduler})
    for given in ({}, {"rate": scheduler}, {"lr": scheduler, "more": scheduler}):
        with refused(pipe, r"holds the state of \['lr'\] and load was given", lr=scheduler):
            pipe.load(tmp_path, stateful=given)


class Fussy:
    """Takes no state but that of its own version."""

    def __init__(self, version: int) -> None:
        self.version = version

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["version"] != self.version:
            raise KeyError("another version")


def test_a_holder_that_refuses_its_state_changes_nothing(tmp_path: Path) -> None:
    pipe = make(2)
    scheduler, generator = one_cycle(pipe.optimizer), torch.Generator()
    pipe.save(tmp_path, stateful={"lr": scheduler, "draw": generator, "fussy": Fussy(1)})
    pipe.train_step(*next(batches(1)))
    scheduler.step()
    drawn = torch.rand(1, generator=generator)
    before = generator.get_state()
    with refused(pipe, "'fussy' refuses its state in .*: KeyError", lr=scheduler):
        pipe.load(tmp_path, stateful={"lr": scheduler, "draw": generator, "fussy": Fussy(2)})
    assert torch.equal(generator.get_state(), before)
    pipe.load(tmp_path, stateful={"lr": scheduler, "draw": generator, "fussy": Fussy(1)})
    assert torch.rand(1, generator=generator) == drawn


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
    return rp.Pipeline(layers, LocalCluster(workers), loss=cross_entropy, optimizer=amsgrad, balance=balance, chunks=2)  # type: ignore[arg-type]


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


def assert_same_state(one: rp.Pipeline, other: rp.Pipeline) -> None:
    found = one.state_dict()
    assert all(torch.equal(found[name], value) for name, value in other.state_dict().items())


def test_a_layer_thawed_since_has_no_state_and_a_frozen_one_needs_none(tmp_path: Path) -> None:
    def pipeline(frozen: bool) -> rp.Pipeline:
        model = mlp()
        model[0].requires_grad_(not frozen)
        return pipeline_of(*model)

    pipe = pipeline(frozen=True)
    pipe.train_step(*next(batches(1)))
    folder = pipe.save(tmp_path)
    thawed = pipeline(frozen=False)
    with refused(thawed, "holds no optimizer state for '0.0.weight', which was frozen"):
        thawed.load(folder)
    folder = thawed.save(tmp_path)
    pipe.load(folder)


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"anything": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Expanded(nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, 4)
        self.register_buffer("mask", torch.ones(1).expand(4))


@pytest.mark.parametrize(
    ("layer", "message"),
    [(Extra(12, 4), "1._extra_state is a dict, not a tensor"), (Expanded(), "1.mask is expanded, so torch could not")],
)
def test_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path, layer: nn.Module, message: str) -> None:
    pipe = pipeline_of(nn.Linear(12, 12), layer)
    with pytest.raises(rp.CheckpointError, match=rf"worker1 on elsewhere: {message}.*; the checkpoints before are as"):
        pipe.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Scale:
    """Stands for what a pipeline holds on the driver beside its optimizer."""

    def __init__(self, value: float) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_a_pipelines_own_parts_are_saved_and_those_that_fit_loaded(tmp_path: Path) -> None:
    pipe, other = make(2), make(1)
    pipe._parts |= {"scale": Scale(8.0), "gone": Scale(1.0)}
    mine = {"scale": Scale(2.0), "new": Scale(3.0)}
    other._parts |= mine
    # The caller's names are the caller's: one may be the same.
    theirs = Scale(5.0)
    pipe.save(tmp_path, stateful={"scale": theirs})
    theirs.value = 6.0
    other.load(tmp_path, stateful={"scale": theirs})
    assert [mine["scale"].value, mine["new"].value, theirs.value] == [8.0, 3.0, 5.0]


def test_inside_a_step_nothing_is_saved_or_loaded(tmp_path: Path) -> None:
    pipe = make(2)
    pipe.save(tmp_path)
    with pipe.step():
        with pytest.raises(ValueError, match="save after its with-block"):
            pipe.save(tmp_path)
        with pytest.raises(ValueError, match="load after its with-block"):
            pipe.load(tmp_path)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        pipe.save(tmp_path, keep=0)


def test_hyperparameters_that_only_some_workers_have_stay_the_factorys(tmp_path: Path) -> None:
    """A group's rate may be a function of the parameters that a worker happens to hold."""

    def by_size(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1 / len(params), momentum=0.9)

    def pipeline() -> rp.Pipeline:
        return rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=by_size, balance=[6, 2], chunks=2)  # type: ignore[arg-type]

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


# --- other readers ---


def test_transformers_and_plain_torch_read_the_weights(tmp_path: Path) -> None:
    pipe = make(3)
    for batch in batches(2):
        pipe.train_step(*batch)
    folder = pipe.save(tmp_path)
    by_transformers = mlp()
    load_sharded_checkpoint(by_transformers, str(folder))
    assert_same_weights(pipe, by_transformers)

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    plain = mlp()
    assert list(index["weight_map"]) == list(plain.state_dict())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in plain.parameters())
    state: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        state |= load_file(folder / file)
    plain.load_state_dict(state)
    assert_same_weights(pipe, plain)


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
    with pytest.raises(ValueError, match="1 of 2 calls of an accumulation are done: save after the one that updates"):
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


def test_a_model_of_transformers_reads_its_pipelines_checkpoint(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    pipe = rp.from_transformers(config, LocalCluster(3), optimizer=adamw, chunks=2)  # type: ignore[arg-type]
    ids = torch.randint(0, 32, (4, 6))
    pipe.train_step({"input_ids": ids}, {"labels": ids})
    folder = pipe.save(tmp_path)
    config.save_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, pipe({"input_ids": ids}), rtol=1e-5, atol=1e-5)


# --- on real processes ---


@pytest.fixture
def pipe(cluster: rp.Cluster) -> Iterator[rp.Pipeline]:
    made = rp.Pipeline(mlp(width=64), cluster, loss=cross_entropy, optimizer=adamw, chunks=3)
    yield made
    made.close()


def limit_files(module: nn.Module, size: int) -> None:
    """From now on no file of this process may be larger: as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_worker_that_cannot_write_is_named_and_the_checkpoint_before_stays(pipe: rp.Pipeline, tmp_path: Path) -> None:
    data = list(batches(3, width=64))
    pipe.train_step(*data[0])
    first, before = pipe.save(tmp_path), pipe.state_dict()
    pipe.train_step(*data[1])
    pipe.stages[2].call(partial(limit_files, size=4096))
    with pytest.raises(rp.CheckpointError, match=r"^worker2 on .*: cannot write .*model-00003-of-00004.*large"):
        pipe.save(tmp_path)
    assert list(tmp_path.iterdir()) == [first]
    pipe.stages[2].call(partial(limit_files, size=resource.RLIM_INFINITY))
    pipe.load(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    pipe.train_step(*data[2])
    pipe.save(tmp_path)


def test_ctrl_c_in_a_save_leaves_it_done_or_not_done_and_the_pipeline_usable(pipe: rp.Pipeline, tmp_path: Path) -> None:
    draw, data, interrupted, done = random.Random(2), list(batches(4, width=64)), 0, 0
    pipe.save(tmp_path, position=0)
    for attempt in range(1, 21):
        pipe.train_step(*data[attempt % 4])
        before = checkpoints.newest(tmp_path)
        timer = threading.Timer(draw.uniform(0.0, 0.05), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            pipe.save(tmp_path, position=attempt, keep=1)
            timer.join()
            time.sleep(0)  # it comes here at the latest
        except KeyboardInterrupt:
            interrupted += 1
            done += checkpoints.newest(tmp_path) != before
    assert interrupted == 20
    assert done < 20, "none came in time"
    state, trained = pipe.state_dict(), pipe.trained
    pipe.save(tmp_path, position="end", keep=1)
    assert len(list(tmp_path.iterdir())) == 1
    assert pipe.load(tmp_path) == "end"
    assert pipe.trained == trained
    assert all(torch.equal(value, state[name]) for name, value in pipe.state_dict().items())


def test_ctrl_c_in_a_load_leaves_all_of_one_state(pipe: rp.Pipeline, tmp_path: Path) -> None:
    draw, data, loaded = random.Random(4), list(batches(4, width=64)), 0
    pipe.train_step(*data[0])
    states = {pipe.trained: pipe.state_dict()}
    pipe.save(tmp_path)
    for attempt in range(1, 16):
        pipe.train_step(*data[attempt % 4])
        before = pipe.trained
        states[before] = pipe.state_dict()
        timer = threading.Timer(draw.uniform(0.0, 0.03), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            timer.start()
            pipe.load(tmp_path)
            timer.join()
            time.sleep(0)  # it comes here at the latest
        assert pipe.trained in (1, before)
        loaded += pipe.trained == 1
        assert all(torch.equal(value, states[pipe.trained][name]) for name, value in pipe.state_dict().items())
    assert loaded > 0
    pipe.load(tmp_path)
    assert pipe.trained == 1


@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_a_run_killed_at_a_random_moment_goes_on(tmp_path: Path, victim: str) -> None:
    """As in ./benchmarks/run kills, which was run for a hundred of them."""
    kills = Kills(tmp_path / "run", seed=11)
    kills.round(victim)
    assert kills.steps >= 1
