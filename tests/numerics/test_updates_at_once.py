"""Workers update as soon as they are done: the same bits as after the driver's gate, and all or none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd, summed
from support.sent import Sent

WRONG = 1e6  # a value in the inputs that makes a micro-batch go wrong


class Wrong(torch.autograd.Function):
    """Identity; the backward of the micro-batch that is ``marked`` raises, or gives NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, marked: bool, raises: bool) -> torch.Tensor:
        ctx.marked, ctx.raises = marked, raises
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.marked and ctx.raises:
            raise ValueError("boom")
        return grads[0] * math.nan if ctx.marked else grads[0], None, None


class Marked(nn.Module):
    """The first layer: the backward of a micro-batch with ``WRONG`` in it goes wrong, after all other stages' are done.

    Counts its forwards in a buffer, which shows what became of those of a step.
    """

    def __init__(self, *, raises: bool = False) -> None:
        super().__init__()
        self.linear, self.raises = nn.Linear(12, 12), raises
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        marked = bool((x == WRONG).any())
        return Wrong.apply(self.linear(x.clamp(-3, 3)), marked, self.raises)  # type: ignore[no-any-return, no-untyped-call]


def model(layers: int = 4, *, raises: bool = False) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(Marked(raises=raises), *mlp(layers)[1:])


def wait_for_gate(optimizer: torch.optim.Optimizer) -> None:
    """Let updates wait for the driver, as they do while a hook may still change what it sends."""
    optimizer.register_step_pre_hook(lambda *_: None)


def marked(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[-1, 0] = WRONG
    return x


def switching(output: torch.Tensor, target: torch.Tensor) -> Any:
    """A loss whose form depends on the batch's size."""
    return summed(output, target) if len(target) == 4 else cross_entropy(output, target)


OPTIONS: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "zb-v": {"schedule": "zb-v", "virtual_stages": 2},
    "adamw": {"optimizer": adamw},
    "batched": {"dispatch": "batched"},
    "accumulate": {"accumulate": 2},
    "replicas": {"replicas": 2},
    "sharded": {"replicas": 2, "shard_optimizer": True, "optimizer": adamw},
    "batchnorm": {"batch_norm": "deferred"},
    "recompute": {"checkpoint": "always"},
    "clipped": {"clip_grad_norm": 0.1},
    "float16": {"autocast": torch.float16},
    "sum-count": {"loss": summed},
    "switching": {"loss": switching},
}


def run(options: dict[str, Any], *, gate: bool, cluster: Any = None) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Train on batches of which some go wrong; return each step's figures and the state at the end."""
    cluster = cluster or LocalCluster(2 * options.get("replicas", 1), 3)
    given = {"loss": cross_entropy, "optimizer": sgd, "chunks": 4, "schedule": "1f1b"} | options
    layers = nn.Sequential(*model(), nn.BatchNorm1d(4)) if "batch_norm" in options else model()
    sent = Sent(cluster) if isinstance(cluster, LocalCluster) else None
    pipe = rp.Pipeline(layers, cluster, **given)
    if gate:
        wait_for_gate(pipe.optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 2, 0.5)
    figures = []
    for number, (x, y) in enumerate(batches(9, 24)):
        size = 16 if number in (4, 5) else 24
        result = pipe.train_step((marked(x) if number in (3, 6) else x)[-size:], y[-size:])
        figures.append((result.loss, result.grad_norm, result.applied, result.lr, result.accumulated))
        if not result.accumulated:
            scheduler.step()
    assert sent is None or (sent.operations["UpdateWeights"] > 0) == gate
    state = dict(pipe.state_dict())
    pipe.close()
    return figures, state


@pytest.mark.parametrize("name", OPTIONS)
def test_figures_and_weights_are_those_of_updates_after_the_gate(name: str) -> None:
    (at_once, state), (after_gate, expected) = (run(OPTIONS[name], gate=gate) for gate in (False, True))
    assert repr(at_once) == repr(after_gate)
    assert not all(applied for _, _, applied, _, _ in at_once)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def pipeline(cluster: Any, **changed: Any) -> rp.Pipeline:
    given: dict[str, Any] = {"loss": cross_entropy, "optimizer": sgd, "chunks": 4, "schedule": "1f1b"} | changed
    return rp.Pipeline(given.pop("model", None) or model(), cluster, **given)


def test_a_step_is_one_answer_of_each_worker() -> None:
    cluster: Any = LocalCluster(3)
    sent = Sent(cluster)
    pipe = pipeline(cluster)
    (x, y), *_ = batches(1)
    for number in range(3):
        assert pipe.train_step(x, y).applied
        assert sent.operations["CommitStep"] == 3 * (number + 1)
        assert sent.operations["TellNorms"] == 3  # whether the loss is a mean is not known in the first step
    assert sent.operations["UpdateWeights"] == sent.operations["UndoUpdate"] == 0
    assert not pipe.train_step(marked(x), y).applied
    assert (sent.operations["CommitStep"], sent.operations["UndoUpdate"]) == (12, 3)


@pytest.mark.parametrize("name", ["clipped", "float16", "sum-count", "replicas", "sharded"])
def test_workers_agree_without_the_driver(name: str) -> None:
    cluster: Any = LocalCluster(2 * OPTIONS[name].get("replicas", 1))
    sent = Sent(cluster)
    pipe = pipeline(cluster, **OPTIONS[name])
    for x, y in batches(3, 24):
        assert pipe.train_step(x, y).applied
    assert not pipe.train_step(marked(x), y).applied
    assert sent.operations["TellNorms"] == sent.operations["CommitStep"] == 4 * len(cluster.workers)
    assert not sent.operations.keys() & {"UpdateWeights", "NormalizeGradients", "PublishGradients", "UndoUpdate"}


def test_a_failure_after_others_have_updated_changes_no_weight() -> None:
    cluster: Any = LocalCluster(3)
    pipe, twin = pipeline(cluster, model=model(raises=True)), pipeline(LocalCluster(3), model=model(raises=True))
    (x, y), *_ = batches(1)
    for one in (pipe, twin):
        one.train_step(x, y)
        one.train_step(x, y)
    before = pipe.state_dict()
    with pytest.raises(rp.StageError, match="boom"):
        pipe.train_step(marked(x), y)
    assert all(torch.equal(before[key], value) for key, value in pipe.state_dict().items())
    assert pipe.train_step(x, y).loss == twin.train_step(x, y).loss
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in pipe.state_dict().items())


def test_nonfinite_stop_raises_and_changes_no_weight() -> None:
    pipe = pipeline(LocalCluster(3), nonfinite="stop")
    (x, y), *_ = batches(1)
    pipe.train_step(x, y)
    before = pipe.state_dict()
    with pytest.raises(rp.StageError, match="stage 0 is not finite"):
        pipe.train_step(marked(x), y)
    assert all(torch.equal(before[key], value) for key, value in pipe.state_dict().items())
    assert pipe.train_step(x, y).applied


def test_a_step_by_hand_changes_no_weight_before_it_is_told_to() -> None:
    pipe = pipeline(LocalCluster(3))
    (x, y), *_ = batches(1)
    pipe.train_step(x, y)
    before = pipe.state_dict()
    with pipe.step() as step:
        step.forward_backward(x, y)
    after = pipe.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "forwards" not in key)


class Alone(torch.optim.SGD):
    """Changes its learning rate by the gradients that it sees, which are a worker's own."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        if len(self.state) and any(
            p.grad is not None and p.grad.abs().max() > 0 for p in self.param_groups[0]["params"]
        ):
            self.param_groups[0]["lr"] = float(self.param_groups[0]["params"][0].detach().sum())


def test_optimizers_that_part_are_refused_and_taken_back() -> None:
    pipe = pipeline(LocalCluster(2), optimizer=lambda params: Alone(params, lr=0.1, momentum=0.9))
    (x, y), *_ = batches(1)
    before = pipe.state_dict()
    for _ in range(2):
        with pytest.raises(rp.ModelError, match="lr"):
            pipe.train_step(x, y)
        assert all(torch.equal(before[key], value) for key, value in pipe.state_dict().items())
    assert pipe.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", ["1f1b", "clipped", "sum-count", "switching"])
def test_the_same_through_rpc(cluster: rp.Cluster, name: str) -> None:
    (at_once, state), (after_gate, expected) = (
        run(OPTIONS[name], gate=gate, cluster=cluster) for gate in (False, True)
    )
    assert repr(at_once) == repr(after_gate)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("what", ["changes", "leaves out"])
def test_a_step_that_the_user_has_replaced_has_the_last_word(what: str) -> None:
    pipe, twin = pipeline(LocalCluster(2)), pipeline(LocalCluster(2))
    wait_for_gate(twin.optimizer)
    for one in (pipe, twin):
        scheduler = torch.optim.lr_scheduler.StepLR(one.optimizer, 1, 0.5)
        step = one.optimizer.step

        def replaced(optimizer: Any = one.optimizer, step: Any = step) -> None:
            optimizer.param_groups[0]["lr"] *= 0.9
            if what == "changes":
                step()

        one.optimizer.step = replaced  # type: ignore[method-assign]
        for x, y in batches(4):
            one.train_step(x, y)
            scheduler.step()
    for key, value in twin.state_dict().items():
        assert torch.equal(pipe.state_dict()[key], value), key


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_error_after_the_update_takes_it_back(accumulate: int) -> None:
    pipe, twin = (pipeline(LocalCluster(2), accumulate=accumulate) for _ in range(2))
    data = list(batches(6))
    for x, y in data[:2]:
        pipe.train_step(x, y)
        twin.train_step(x, y)

    def boom(*_: Any) -> None:
        raise ValueError("boom")

    before, hook = pipe.state_dict(), pipe.optimizer.register_step_post_hook(boom)
    for x, y in data[2 : 1 + accumulate]:
        pipe.train_step(x, y)
        twin.train_step(x, y)
    with pytest.raises(ValueError, match="boom"):
        pipe.train_step(*data[1 + accumulate])
    after = pipe.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if accumulate == 1 or "forwards" not in key)
    hook.remove()
    for x, y in data[1 + accumulate :]:
        assert pipe.train_step(x, y).loss == twin.train_step(x, y).loss


def test_a_batch_that_failed_is_not_run_again_in_the_same_step() -> None:
    pipe = pipeline(LocalCluster(2), model=model(raises=True))
    (x, y), *_ = batches(1)
    with pipe.step() as step:
        with pytest.raises(rp.StageError, match="boom"):
            step.forward_backward(marked(x), y)
        with pytest.raises(rp.StateError, match="has failed"):
            step.forward_backward(x, y)
    assert pipe.train_step(x, y).applied


def test_an_update_that_failed_is_not_counted_though_its_error_was_swallowed() -> None:
    pipe = pipeline(LocalCluster(2), optimizer=lambda params: Alone(params, lr=0.1, momentum=0.9))
    (x, y), *_ = batches(1)
    with pipe.step() as step:
        step.forward_backward(x, y)
        with pytest.raises(rp.ModelError):
            step.optimize()
    assert pipe.trained == 0
