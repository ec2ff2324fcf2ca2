"""Mistakes that would train wrongly, or nothing, in silence: each is refused, and the pipeline is as new afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.misuse import SCHEDULES, assert_as_new, pipeline
from support.models import batches, sgd

INPUTS, TARGETS = torch.randn(10, 12), torch.randn(10, 4)
mse = nn.functional.mse_loss

OTHER_SIZES: dict[str, Any] = {
    "one row": torch.randn(1, 4), "a row for every micro-batch": torch.randn(2, 4), "fewer": torch.randn(9, 4),
    "more": torch.randn(11, 4), "of a nest": {"a": torch.randn(9, 4)},
    "in another dimension": rp.Batched(torch.randn(4, 9), dim=1),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OTHER_SIZES)
def test_targets_of_another_batch_size_are_refused(name: str, schedule: str) -> None:
    pipe = pipeline(schedule, loss=mse)
    for call in (pipe.train_step, lambda *batch: pipe.evaluate([batch]), lambda *batch: list(pipe.train([batch]))):
        with pytest.raises(rp.ArgumentError, match=r"inputs have 10 samples and targets|their batch sizes differ"):
            call(INPUTS, OTHER_SIZES[name])
    fresh = pipeline(schedule, loss=mse)
    assert pipe.train_step(INPUTS, TARGETS).loss == fresh.train_step(INPUTS, TARGETS).loss


def test_what_says_its_own_cut_is_taken() -> None:
    def loss(output: torch.Tensor, target: Any) -> torch.Tensor:
        return mse(output, target[0]) * target[1].mean()

    pipe = pipeline(loss=loss)
    for target in (
        (TARGETS, rp.Replicated(torch.ones(3))),
        (TARGETS, rp.Batched(torch.ones(3, 10), dim=1)),
        (TARGETS, torch.tensor(1.0)),
    ):
        assert pipe.train_step(INPUTS, target).applied
    parts = [(TARGETS[:3], torch.ones(7)), (TARGETS[3:], torch.ones(2))]
    assert pipe.train_step(rp.MicroBatches([INPUTS[:3], INPUTS[3:]]), rp.MicroBatches(parts)).applied


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "detached": lambda output, target: mse(output, target).detach(),
    "made anew": lambda output, target: torch.tensor(float(mse(output, target)), requires_grad=True),
    "a sum made anew": lambda output, target: (torch.tensor(1.0, requires_grad=True), 5),
    "of classes": lambda output, target: output.argmax(1).float().mean(),
    "a number": lambda output, target: 1.0,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_a_graph_is_refused(name: str, schedule: str) -> None:
    pipe = pipeline(schedule, loss=LOSSES[name])
    before = pipe.state_dict()
    with pytest.raises(rp.ModelError, match=r"nothing would be trained|loss must return a scalar tensor"):
        pipe.train_step(INPUTS, TARGETS)
    assert pipe.trained == 0
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())


def test_a_loss_that_the_model_computes_is_taken() -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean()

    model = [nn.Linear(12, 1), Mean(), nn.Identity()]
    cluster: Any = LocalCluster(3)
    pipe = rp.Pipeline(
        model, cluster, loss=lambda output, target: output, optimizer=sgd, chunks=2, balance=[1, 1, 1]
    )  # fmt: skip
    assert pipe.train_step(INPUTS, TARGETS).applied


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(x)


COLLIDING: dict[str, dict[str, Any]] = {
    "modules": {"a": Outer(), "a.c": nn.Linear(12, 4)},
    "buffers": {"a": nn.Sequential(nn.BatchNorm1d(12, affine=False)), "a.0": nn.BatchNorm1d(12, affine=False)},
    "specs": {"a": rp.LayerSpec(Outer), "a.c": rp.LayerSpec(nn.Linear, 12, 4)},
}


@pytest.mark.parametrize("name", COLLIDING)
def test_layers_with_the_same_names_in_the_state_are_refused(name: str) -> None:
    cluster: Any = LocalCluster(2)
    with pytest.raises(rp.ModelError, match=r"'a\.[c0]\.\w+' in the model's state_dict is of"):
        rp.Pipeline(COLLIDING[name], cluster, loss=mse, optimizer=sgd, chunks=2)
    assert not cluster.pipelines


def test_a_layer_named_inside_of_another_is_taken() -> None:
    cluster: Any = LocalCluster(2)
    pipe = rp.Pipeline({"a": Outer(), "a.d": nn.Linear(12, 4)}, cluster, loss=mse, optimizer=sgd, chunks=2)
    assert list(pipe.state_dict()) == ["a.c.weight", "a.c.bias", "a.d.weight", "a.d.bias"]


MODULES_HAVE = {
    "eval": "run in eval mode", "parameters": r"pipe.parameter_rrefs\(\)", "to": "on its worker's device",
    "cuda": "on its worker's device", "named_parameters": "pipe.state_dict", "modules": "pipe.stages",
    "backward": "pipe.train_step", "zero_grad": r"pipe.optimizer.zero_grad\(\)", "fit": "pipe.train", "spam": "'spam'$",
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES_HAVE)
def test_an_attribute_that_modules_have_says_what_to_use(name: str) -> None:
    pipe = pipeline()
    with pytest.raises(AttributeError, match=f"a Pipeline has no attribute '{name}'.*{MODULES_HAVE[name]}|'spam'$"):
        getattr(pipe, name)
    assert not hasattr(pipe, name)


WRONG_SETTINGS: dict[str, tuple[Any, str]] = {
    "nonfinite": ("foo", "nonfinite must be 'skip' or 'stop', not 'foo'"),
    "chunks": ("x", "chunks must be a whole number of at least 1, not .x."),
    "accumulate": ("2", "accumulate must be"),
    "clip_grad_norm": (math.nan, "clip_grad_norm must be a number above 0, or None not to clip, not nan"),
    "balance": ([1, 3], r"pipe.balance = \[1, 3\] is not possible: pipe.resize\(balance=\[…\]\)"),
    "replicas": (2, r"pipe.replicas = 2 is not possible: pipe.resize\(replicas=…\)"),
    "virtual_stages": (2, "pipe.schedule = rp.schedules.get"),
    "optimizer": (None, "pipe.optimizer.param_groups"),
    "stages": ((), r"pipe.resize\(balance=\[…\]\)"),
    "loss": (mse, "pipe.loss = .*it is decided when the Pipeline is made; make another one with loss=…"),
    "checkpoint": ("always", "make another one with checkpoint=…"),
    "seed": (3, "make another one with seed=…"),
    "chunk": (3, "pipe.chunk = 3 is not possible: a Pipeline has no such setting"),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_a_setting_that_would_change_nothing_is_refused(name: str) -> None:
    pipe, (value, message) = pipeline(), WRONG_SETTINGS[name]
    with pytest.raises((rp.ArgumentError, AttributeError), match=message):
        setattr(pipe, name, value)
    assert_as_new(pipe)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_launching_in_every_rank_of_torchrun_is_refused(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(rp.StateError, match=rf"rank {rank} of 2 .* use rp.connect\(\)"):
        rp.launch(2)


def test_a_short_write_leaves_no_torn_record(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes 7 bytes at a time, and then none, amid a record."""
    import json

    pipe, path = pipeline(), tmp_path / "run.jsonl"
    lines = pipe.on_step(path)
    file: Any = lines._file  # type: ignore[union-attr]

    class Disk:
        left = 10_000

        def write(self, data: memoryview) -> int:
            taken = min(7, self.left)
            if not taken:
                raise OSError(28, "No space left on device")
            self.left -= taken
            return int(file.write(data[:taken]))

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    disk = Disk()
    monkeypatch.setattr(lines, "_file", disk)
    feed = list(batches(3))
    pipe.train_step(*feed[0])
    disk.left = 50
    with pytest.raises(OSError, match="No space left"):
        pipe.train_step(*feed[1])
    disk.left = 10_000
    pipe.train_step(*feed[2])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2]
