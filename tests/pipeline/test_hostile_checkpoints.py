"""Manifests with a right checksum and wrong content, files that are none: refused, and the next step has its bits."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd
from support.saving import contents, make, one_cycle, pipeline_of, refused

Change = Callable[[dict[str, Any]], Any]


def rewrite(folder: Path, change: Change) -> None:
    """Change the manifest's content, or replace it by what ``change`` returns, and make the checksum right."""
    file = folder / "checkpoint.json"
    document = json.loads(file.read_text())
    returned = change(document["content"])
    content = document["content"] if returned is None else returned
    document |= {"content": content, "crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode())}
    file.write_text(json.dumps(document))


def put(*path: str | int, to: Any) -> Change:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def drop(*path: str | int) -> Change:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


FIELDS = (
    "step",
    "position",
    "stateful",
    "parts",
    "seed",
    "groups",
    "state",
    "shared",
    "extra",
    "loss",
    "weights",
    "tensors",
)
WEIGHT, MOMENT, GROUP = ("weights", "0.0.weight"), ("state", "0.0.weight"), ("groups", 0)
FORMS: dict[str, Change] = {
    **{f"content {value!r}": (lambda content, value=value: value) for value in ([], "x", 5, True)},
    **{f"{field} is {value!r}": put(field, to=value) for field in FIELDS[2:] for value in ("x", 1.5, None, [5])},
    **{f"step is {value!r}": put("step", to=value) for value in ("x", 1.5, None, True, -1, 1 << 63)},
    "no step": drop("step"),
    "no weights": drop("weights"),
    "an unknown entry": put("other", to=1),
    "optimizer 5": put("optimizer", to=5),
    "another class": put("optimizer", to="SGD"),
    "no group": put("groups", to=[]),
    "a group in tuples": put(*GROUP, to={"$tuple": []}),
    **{f"lr {value!r}": put(*GROUP, "lr", to=value) for value in ("x", None, [0.1], True, {"$float": "nan"}, {})},
    **{f"betas {value!r}": put(*GROUP, "betas", to=value) for value in (0.9, [0.9, 0.99], {"$tuple": [0.9]}, "ab")},
    "lr a tensor": put(*GROUP, "lr", to={"$tensor": "0.0.weight/exp_avg"}),
    "parameters in a group": put(*GROUP, "params", to=[]),
    "a number as an option": put(*GROUP, to={"$dict": [[1, 2]]}),
    "a method": put(*GROUP, "optimizer.step", to=1),
    "torch's attribute": put(*GROUP, "optimizer.param_groups", to=[]),
    "differentiable": put(*GROUP, "differentiable", to=True),
    "capturable": put(*GROUP, "capturable", to=True),
    "state in a list": put(*MOMENT, to=[]),
    "state in a float": put(*MOMENT, to={"$float": "inf"}),
    "state of one less": drop(*MOMENT),
    "no step of the state": drop(*MOMENT, "step"),
    "no moment": drop(*MOMENT, "exp_avg"),
    **{f"moment {value!r}": put(*MOMENT, "exp_avg", to=value) for value in (5, "x", [], {}, True)},
    "another's moment": put(*MOMENT, "exp_avg", to={"$tensor": "0.0.bias/exp_avg"}),
    "a moment as step": put(*MOMENT, "step", to={"$tensor": "0.0.bias/exp_avg"}),
    "a step before the first": put(*MOMENT, "step", to=-1),
    "a step in words": put(*MOMENT, "step", to="x"),
    **{f"tensor {name!r}": put(*MOMENT, "exp_avg", to={"$tensor": name}) for name in ("none", 5, None, [])},
    **{f"file {name!r}": put(*WEIGHT, 0, to=name) for name in
       ("../x", "/etc/passwd", "a/b", "", ".", "..", "a\0b", 5, None, "checkpoint.json", "none", "\ud800")},
    **{f"dtype {name!r}": put(*WEIGHT, 1, to=name) for name in ("torch.nn", "x", "", 5, "torch.float64", "torch.int8")},
    **{f"shape {shape!r}": put(*WEIGHT, 2, to=shape) for shape in ("x", [-1], [1.5], [144], 5, [12, True], [1 << 70])},
    **{f"checksum {value!r}": put(*WEIGHT, 3, to=value) for value in ("x", -1, 1.5, 5, 1 << 40)},
    "a short location": put(*WEIGHT, to=["model"]),
    "a weight less": drop(*WEIGHT),
    "another's location": lambda content: put(*WEIGHT, to=content["weights"]["0.0.bias"])(content),
    "extra state that nobody has": put("extra", to={"x._extra_state": 1}),
    "a loss that remembers": put("loss", to={"a": 1}),
    "states that nobody has": put("stateful", to={"lr": {}}),
    "tagged states": put("stateful", to={"$dict": []}),
    **{f"position {value!r:.40}": put("position", to=value) for value in (
        {"$tuple": 5}, {"$dict": [[[1], 2]]}, {"$dict": [[{"$dict": []}, 2]]}, {"$dict": [[1]]}, {"$dict": 5},
        {"$other": 1}, {"$float": "x"}, {"$float": []}, {"$tensor": "x"}, {"$tuple": [], "more": 1},
        {"$counter": [["a", "b"]]}, nested(700),
    )},
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = make(2)
    for batch in batches(2):
        pipe.train_step(*batch)
    return pipe.save(tmp_path_factory.mktemp("run"))


TWINS: list[rp.Pipeline] = []


@pytest.fixture
def twins() -> Iterator[list[rp.Pipeline]]:
    """A pipeline that everything is loaded into, and one that nothing is; both are new after a test that fails."""
    TWINS.extend(make(2) for _ in range(2 - len(TWINS)))
    pair = TWINS.copy()
    TWINS.clear()
    yield pair
    assert_alike(*pair)
    TWINS.extend(pair)


def assert_alike(pipe: rp.Pipeline, untouched: rp.Pipeline) -> None:
    """A step of both has the same bits."""
    [batch] = batches(1)
    one, other = pipe.train_step(*batch), untouched.train_step(*batch)
    assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    assert all(torch.equal(value, untouched.state_dict()[name]) for name, value in pipe.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_manifest_is_refused_and_the_next_step_has_its_bits(
    saved: Path, twins: list[rp.Pipeline], form: str, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    rewrite(folder, FORMS[form])
    with refused(twins[0], ""):
        twins[0].load(folder)


def strike_file(kind: str, file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "link":
        file.with_name("elsewhere").write_bytes(content)
        file.symlink_to("elsewhere")
    elif kind == "folder":
        file.mkdir()
    elif kind == "socket":
        home = Path.cwd()
        os.chdir(file.parent)  # a socket's path is short
        try:
            socket.socket(socket.AF_UNIX).bind(file.name)
        finally:
            os.chdir(home)
    else:
        file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "name", ["checkpoint.json", "model-00002-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"]
)
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "socket", "device"])
def test_only_regular_files_are_read(
    saved: Path, twins: list[rp.Pipeline], kind: str, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    strike_file(kind, folder / name)
    with refused(twins[0], f"{name}.* cannot be read"):
        twins[0].load(folder)


def test_a_path_need_not_be_utf8(tmp_path: Path) -> None:
    pipe, directory = make(2), tmp_path / os.fsdecode(b"run \xff")
    pipe.train_step(*next(batches(1)))
    folder = pipe.save(directory)
    assert folder.parent == directory
    before = pipe.state_dict()
    pipe.train_step(*next(batches(1)))
    pipe.load(directory)
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    (folder / "model-00001-of-00002.safetensors").unlink()
    with refused(pipe, "model-00001-of-00002.safetensors"):
        pipe.load(directory)


# --- what takes its state by a method of its own ---


class Scale(nn.Linear):
    """A layer with extra state, which takes numbers only."""

    factor = 1.0

    def get_extra_state(self) -> Any:
        return {"factor": self.factor}

    def set_extra_state(self, state: Any) -> None:
        self.factor = 1.0 + state["factor"] - 1.0


class Counting:
    """A loss that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return cross_entropy(output, target)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"] + 0


def counting(layer: nn.Module) -> rp.Pipeline:
    return rp.Pipeline([nn.Linear(12, 12), layer], LocalCluster(2), loss=Counting(), optimizer=sgd, chunks=2)


def test_extra_state_and_a_losss_state_are_tried_before_anything_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe, untouched = (counting(layer) for layer in copy.deepcopy([Scale(12, 4)] * 2))
    untouched.load_state_dict(pipe.state_dict())
    pipe.train_step(*next(batches(1)))
    untouched.train_step(*next(batches(1)))
    for number, (change, message) in enumerate((
        (put("extra", "1._extra_state", to={}), "Scale does not take '1._extra_state': KeyError"),
        (put("extra", "1._extra_state", "factor", to="x"), "Scale does not take '1._extra_state': TypeError"),
        (put("loss", "calls", to="x"), "the loss does not take its saved state: TypeError"),
        (put("loss", to={"others": 1}), r"the loss does not take its saved state: .* has no \['others'\]"),
    )):  # fmt: skip
        folder = pipe.save(tmp_path / str(number))
        rewrite(folder, change)
        with pytest.raises(rp.CheckpointError, match=message):
            pipe.load(folder)
        one, other = pipe.train_step(*next(batches(1))), untouched.train_step(*next(batches(1)))
        assert one.loss == other.loss
    calls = [one.stages[1].call(lambda module: module[0].factor) for one in (pipe, untouched)]
    assert calls == [1.0, 1.0]


@pytest.mark.parametrize(
    "change", [put("stateful", "lr", "last_epoch", to="x"), drop("stateful", "lr", "_schedule_phases")]
)
def test_a_schedulers_state_is_compared_with_its_own(tmp_path: Path, change: Change) -> None:
    pipe = make(2)
    scheduler = one_cycle(pipe.optimizer)
    folder = pipe.save(tmp_path, stateful={"lr": scheduler})
    rewrite(folder, change)
    with refused(pipe, "'lr' refuses its state", lr=scheduler):
        pipe.load(folder, stateful={"lr": scheduler})
    pipe.train_step(*next(batches(1)))
    scheduler.step()


@pytest.mark.parametrize("scale", ["x", None, [], {"$tensor": "none"}])
def test_the_loss_scale_is_a_number(tmp_path: Path, scale: Any) -> None:
    pipe = make(2, autocast=torch.float16)
    folder = pipe.save(tmp_path)
    rewrite(folder, put("parts", "scaler", "scale", to=scale))
    with refused(pipe, "the pipeline's scaler refuses its state|parts/scaler/scale"):
        pipe.load(folder)
    assert pipe.scaler is not None
    assert pipe.scaler.get_scale() == 2.0**16


# --- beginning and resuming ---


def test_one_script_begins_and_resumes(tmp_path: Path) -> None:
    pipe, directory = make(2), tmp_path / "run"
    for found in (False, True):
        assert pipe.load(directory, missing_ok=True) is found
        assert pipe.trained == found
        pipe.train_step(*next(batches(1)))
        pipe.save(directory, position="here")
    assert pipe.load(directory) == "here"
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "nowhere"):
        assert pipe.load(missing, missing_ok=True) is False
        with refused(pipe, "no checkpoint in .*missing_ok=True"):
            pipe.load(missing)
    (tmp_path / "file").write_text("")
    with refused(pipe, "file cannot be looked into"):
        pipe.load(tmp_path / "file", missing_ok=True)
    assert contents(tmp_path / "empty") == []


# --- optimizers whose state is not one tensor of each parameter's shape ---


def test_states_of_other_shapes_and_kinds_are_loaded(tmp_path: Path) -> None:
    def factored(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(params, lr=0.01)

    for name, factory in {"factored": factored, "sgd": lambda p: torch.optim.SGD(p, lr=0.1), "momentum": sgd}.items():
        pipe, other = (pipeline_of(*mlp(4), optimizer=factory) for _ in range(2))
        data = list(batches(3))
        for batch in data[:2]:
            pipe.train_step(*batch)
        other.load(pipe.save(tmp_path / name))
        assert other.train_step(*data[2]).loss == pipe.train_step(*data[2]).loss
    pipe, other = make(2), pipeline_of(*mlp(), optimizer=lambda params: adamw(params))
    other.load(pipe.save(tmp_path / "untrained"))
