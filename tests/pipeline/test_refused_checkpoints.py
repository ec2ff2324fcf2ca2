"""Checkpoints that are damaged or belong to another model: refused by name, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rpcpipe as rp
from support.models import adamw, batches, mlp, sgd
from support.saving import contents, make, one_cycle, pipeline_of, refused


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
        return {"scale": 1j}

    def set_extra_state(self, state: Any) -> None:
        pass


class Expanded(nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, 4)
        self.register_buffer("mask", torch.ones(1).expand(4))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Extra(12, 4), "1._extra_state/scale is a complex: a checkpoint holds"),
        (Expanded(), "1.mask is expanded, so torch could not"),
    ],
)
def test_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path, layer: nn.Module, message: str) -> None:
    pipe = pipeline_of(nn.Linear(12, 12), layer)
    with pytest.raises(rp.CheckpointError, match=rf"worker1 on elsewhere: {message}.*; the checkpoints before are as"):
        pipe.save(tmp_path)
    assert contents(tmp_path) == []
