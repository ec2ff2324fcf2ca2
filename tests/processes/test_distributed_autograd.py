"""Gradients in torch's distributed-autograd contexts: torch's DistributedOptimizer and calls made by hand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
from torch import nn
from torch.distributed.optim import DistributedOptimizer

import rpcpipe as rp
from support.models import batches, cross_entropy, mlp, sgd
from support.oracle import Oracle, assert_same_weights


@pytest.fixture
def pipe(cluster: rp.Cluster) -> Any:
    made = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=3)
    yield made
    made.close()


def test_torchs_distributed_optimizer_takes_the_context(pipe: rp.Pipeline) -> None:
    oracle = Oracle(mlp(), lambda params: torch.optim.SGD(params, lr=0.1), cross_entropy, 3)
    for inputs, targets in batches(2):
        with pipe.step() as step:
            optimizer = DistributedOptimizer(torch.optim.SGD, pipe.parameter_rrefs(), lr=0.1)
            assert step.forward_backward(inputs, targets) == oracle.train_step(inputs, targets)
            optimizer.step(step.context_id)
    assert_same_weights(pipe, oracle.model)


def grads_by_autograd(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    cross_entropy(model(x), y).backward()
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


def context_gradients(context_id: int, module: nn.Module) -> list[torch.Tensor]:
    found = dist_autograd.get_gradients(context_id)  # type: ignore[attr-defined]
    return [found[p] for p in module.parameters()]


class ContextGradients:
    """Runs on a worker: the gradients a context holds there."""

    def __init__(self, context_id: int) -> None:
        self.context_id = context_id

    def __call__(self, module: nn.Module) -> list[torch.Tensor]:
        return context_gradients(self.context_id, module)


def test_hand_made_calls_are_differentiated_across_workers(cluster: rp.Cluster) -> None:
    x, y = next(batches(1))
    model = mlp(4, dropout=0.0)
    pipe = rp.Pipeline(mlp(4, dropout=0.0), cluster, loss=cross_entropy, optimizer=sgd, balance=[2, 2])
    with dist_autograd.context() as context_id:
        hidden = pipe.stages[0].forward(x)
        output = pipe.stages[1].forward(hidden)
        dist_autograd.backward(context_id, [cross_entropy(output.to_here(), y)])  # type: ignore[attr-defined]
        found = [grad for stage in pipe.stages for grad in stage.call(ContextGradients(context_id))]
    for mine, local in zip(found, grads_by_autograd(model, x, y), strict=True):
        assert torch.equal(mine, local)
    assert pipe.stages[0].rref.owner_name().startswith("worker0-")  # and a number
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pipe.stages[0].forward(torch.randn(3, 5)).to_here()
    pipe.close()


class Pointers:
    """Runs on a worker: where the gradients lie before and after the hand-over."""

    def __init__(self, context_id: int) -> None:
        self.context_id = context_id

    def __call__(self, module: nn.Module) -> bool:
        from rpcpipe.stage import gradients

        parameters = [p for p in module.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        before = [p.grad.data_ptr() for p in parameters]  # type: ignore[union-attr]
        root = gradients.take(parameters)
        assert root is not None
        dist_autograd.backward(self.context_id, [root])  # type: ignore[attr-defined]
        found = dist_autograd.get_gradients(self.context_id)  # type: ignore[attr-defined]
        return before == [found[p].data_ptr() for p in parameters]


def test_the_hand_over_copies_nothing(pipe: rp.Pipeline) -> None:
    with dist_autograd.context() as context_id:
        assert pipe.stages[1].call(Pointers(context_id)) is True


def test_many_hand_made_chains_do_not_block_the_handlers(cluster: rp.Cluster) -> None:
    model = mlp(4, dropout=0.0)
    pipe = rp.Pipeline(mlp(4, dropout=0.0), cluster, loss=cross_entropy, optimizer=sgd)
    inputs = [torch.randn(2, 12) for _ in range(8)]
    outputs = []
    for x in inputs:
        for stage in pipe.stages:
            x = stage.forward(x)
        outputs.append(x)
    for x, output in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(output.to_here(timeout=20), model(x))
    pipe.close()


def test_steps_inside_of_other_contexts_work_or_say_why_not(cluster: rp.Cluster, pipe: rp.Pipeline) -> None:
    """Of another pipeline's step, of the user's own, and of a step that was entered and forgotten."""
    batch, loop = next(batches(1)), Oracle(mlp(), sgd, cross_entropy, 3)
    other = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=3)
    with pipe.step() as step:
        first = other.train_step(*batch).loss
        with pytest.raises(rp.StateError, match="in a distributed-autograd context already"):
            other.step().__enter__()
        assert step.forward_backward(*batch) == first == loop.train_step(*batch)
        step.optimize()
    with dist_autograd.context():
        second = loop.train_step(*batch)
        assert pipe.train_step(*batch).loss == second
        with pytest.raises(rp.StateError, match="'MainThread' is in a distributed-autograd context already"):
            pipe.step().__enter__()
    assert other.train_step(*batch).loss == second
    pipe.step().__enter__()
    third = loop.train_step(*batch)
    assert other.train_step(*batch).loss == third
    with pipe.step() as step:
        assert step.forward_backward(*batch) == third
    other.close()


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_several_threads_train_through_real_workers(cluster: rp.Cluster, schedule: str) -> None:
    batch = next(batches(1))
    pipes = [
        rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, schedule=schedule, chunks=3) for _ in range(2)
    ]
    with ThreadPoolExecutor(3) as threads:
        calls = [
            threads.submit(call)
            for _ in range(4)
            for call in (lambda: pipes[0].train_step(*batch).loss, lambda: pipes[0].evaluate([batch]))
        ]
        losses = {call.result(60) for call in calls[::2]}
    assert losses == {pipes[1].train_step(*batch).loss for _ in range(4)}
    for pipe in pipes:
        pipe.close()
