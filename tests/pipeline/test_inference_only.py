"""A pipeline without an optimizer infers, with a loss it evaluates, and what trains is refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd


def frozen() -> nn.Sequential:
    return mlp(4).requires_grad_(False)


def parameterless() -> nn.Sequential:
    return nn.Sequential(nn.Tanh(), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())


MODELS: dict[str, Callable[[], nn.Sequential]] = {"trainable": lambda: mlp(4), "frozen": frozen, "bare": parameterless}
FORWARD = rp.Schedule.from_actions(
    [[rp.schedules.Action("F", stage, chunk) for chunk in range(3)] for stage in range(2)]
)
SCHEDULES: dict[str, Any] = {
    "1f1b": {"chunks": 3},
    "zb-v": {"schedule": "zb-v", "chunks": 3},
    "pipedream": {"schedule": "pipedream", "chunks": 3},
    "forward only": {"schedule": FORWARD},
    "replicas": {"replicas": 2, "chunks": 2, "shard_optimizer": True},
    "float16": {"autocast": torch.float16, "chunks": 3},
    "deferred statistics": {"batch_norm": "deferred", "chunks": 3},
}


def pipeline(model: nn.Sequential, **arguments: Any) -> rp.Pipeline:
    return rp.Pipeline(model, LocalCluster(4 if "replicas" in arguments else 2), **arguments)  # type: ignore[arg-type]


def outputs(model: nn.Sequential, kind: str, x: torch.Tensor) -> torch.Tensor:
    pieces = x.chunk(2) if kind == "replicas" else [x]
    parts = [part for piece in pieces for part in piece.chunk(2 if kind == "replicas" else 3)]
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=kind == "float16"):
        return torch.cat([model.eval()(part) for part in parts])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_it_infers_as_the_unsplit_model(kind: str, model: str) -> None:
    pipe, unsplit = pipeline(MODELS[model](), **SCHEDULES[kind]), MODELS[model]()
    assert "inference only" in repr(pipe)
    [(x, _)] = batches(1)
    assert torch.equal(pipe(x), outputs(unsplit, kind, x))
    changed = {name: value + 1 for name, value in unsplit.state_dict().items()}
    pipe.load_state_dict(changed)
    unsplit.load_state_dict(changed)
    assert all(torch.equal(value, changed[name]) for name, value in pipe.state_dict().items())
    [found] = pipe.predict([x])
    assert torch.equal(found, outputs(unsplit, kind, x))
    sizes = [pipe.stages[k].call(lambda module: len(list(module.children()))) for k in range(len(pipe.stages))]
    assert sizes == pipe.balance
    assert sum(sizes) == 4


def correct(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (output.argmax(-1) == target).sum(), len(target)


@pytest.mark.parametrize("schedule", [{"schedule": "1f1b", "chunks": 2}, {"schedule": FORWARD}])
def test_with_a_loss_it_evaluates(schedule: dict[str, Any]) -> None:
    data = list(batches(3))
    trained = pipeline(mlp(4), loss=cross_entropy, optimizer=sgd, chunks=schedule.get("chunks", 3))
    pipe = pipeline(mlp(4), loss=cross_entropy, **schedule)
    assert pipe.evaluate(data) == trained.evaluate(data)
    assert pipe.evaluate(data, {"accuracy": correct}) == trained.evaluate(data, {"accuracy": correct})


TRAINING: dict[str, Callable[[rp.Pipeline, Any], Any]] = {
    "train_step": lambda pipe, batch: pipe.train_step(*batch),
    "train": lambda pipe, batch: list(pipe.train([batch])),
    "step": lambda pipe, batch: pipe.step(),
    "parameter_rrefs": lambda pipe, batch: pipe.parameter_rrefs(),
    "optimizer": lambda pipe, batch: pipe.optimizer,
}


@pytest.mark.parametrize("arguments", [{}, {"loss": cross_entropy}, {"schedule": "pipedream"}, {"schedule": FORWARD}])
def test_what_trains_is_refused_and_the_pipeline_goes_on(arguments: dict[str, Any], tmp_path: Any) -> None:
    pipe, [batch] = pipeline(mlp(4), **arguments), batches(1)
    for call in TRAINING.values():
        with pytest.raises(rp.StateError, match="without an optimizer and cannot train: make one with loss=… and"):
            call(pipe, batch)
    with pytest.raises(rp.StateError, match=r"no training to go on with: save pipe.state_dict"):
        pipe.save(tmp_path)
    if "loss" not in arguments:
        with pytest.raises(rp.StateError, match=r"evaluate needs the loss .*make one with loss=…, or compare"):
            pipe.evaluate([batch])
    assert pipe(batch[0]).shape == (10, 4)
    assert pipe.trained == 0


def test_an_optimizer_needs_a_loss_and_something_to_train() -> None:
    with pytest.raises(rp.ArgumentError, match="optimizer=… needs loss=… to train; leave both out"):
        pipeline(mlp(4), optimizer=sgd)
    with pytest.raises(rp.ModelError, match="nothing to train; leave optimizer=… out to infer"):
        pipeline(frozen(), loss=cross_entropy, optimizer=sgd)


def test_the_schedule_may_change_and_weights_move() -> None:
    pipe, [(x, _)] = pipeline(mlp(4), chunks=3), batches(1)
    for schedule in ("zb-v", FORWARD, "interleaved", "pipedream"):
        pipe.schedule = schedule  # type: ignore[assignment]
        assert torch.equal(pipe(x), outputs(mlp(4), "", x))
    pipe.chunks = 1
    assert torch.allclose(pipe(x), outputs(mlp(4), "", x), atol=1e-6)


def test_it_generates() -> None:
    def words() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 7))

    [row] = rp.generate(pipeline(words()), torch.tensor([[3, 1]]), 4)
    expected = [3, 1]
    for _ in range(4):
        expected.append(int(words()(torch.tensor(expected))[-1].argmax()))
    assert row.tolist() == expected


def test_a_checkpoint_of_training_is_loaded_for_inference(tmp_path: Any) -> None:
    def groups(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": params}, {"params": [], "lr": 0.5}], lr=0.1, momentum=0.9)

    trained, [batch] = pipeline(mlp(4), loss=cross_entropy, optimizer=groups, chunks=3), batches(1)
    trained.train_step(*batch)
    trained.save(tmp_path, position={"batch": 1})
    pipe = pipeline(mlp(4), chunks=3)
    assert pipe.load(tmp_path) == {"batch": 1}
    assert torch.equal(pipe(batch[0]), trained(batch[0]))
