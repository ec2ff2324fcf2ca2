"""Metrics and outputs of the training forward: those of a plain loop, and training is the same whether asked or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd, summed
from support.oracle import Oracle, Versioned, assert_same_weights, train

SYNCHRONOUS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batched": {"dispatch": "batched"},
    "split backward": {"schedule": "zb-h1"},
    "in a V": {"schedule": "zb-v"},
    "recomputed": {"checkpoint": "always"},
    "recomputed in part": {"checkpoint": 0.5},
    "replicas": {"replicas": 2},
    "sums": {"loss": summed},
    "sums, recomputed": {"loss": summed, "checkpoint": "always"},
    "a small batch": {"chunks": 16},
}


def correct(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    assert not output.requires_grad
    assert not torch.is_grad_enabled()
    return (output.argmax(-1) == target).sum(), len(target)


def largest(output: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Draws random numbers, and counts only where the target is 3."""
    kept = output[target == 3] + 0 * torch.rand(1)
    return float(kept.max(-1).values.sum()) if len(kept) else 0.0, float(len(kept))


METRICS = {"correct": correct, "largest": largest}


def by_hand(output: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
    kept = output[target == 3].max(-1).values
    return {
        "correct": float((output.argmax(-1) == target).double().mean()),
        "largest": pytest.approx(float(kept.mean()), rel=1e-6),
    }


class Recorded:
    """A loss that keeps the outputs it sees."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.seen = loss, list[torch.Tensor]()

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> Any:
        self.seen.append(output.detach())
        return self.loss(output, target)

    def take(self) -> torch.Tensor:
        seen, self.seen = self.seen, []
        return torch.cat(seen)


def pipeline(**arguments: Any) -> rp.Pipeline:
    workers = 2 * arguments.get("replicas", 1)
    arguments = {"loss": cross_entropy, "chunks": 3, **arguments}
    return rp.Pipeline(mlp(dropout=0.3), LocalCluster(workers), optimizer=sgd, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SYNCHRONOUS)
def test_those_of_the_plain_loop(kind: str) -> None:
    arguments = SYNCHRONOUS[kind]
    loss = Recorded(arguments.get("loss", cross_entropy))
    chunks = min(arguments.get("chunks", 3), 10)
    loop = Oracle(mlp(dropout=0.3), sgd, loss, chunks, replicas=arguments.get("replicas", 1))
    pipe = pipeline(**arguments)
    for number, (inputs, targets) in enumerate(batches(6)):
        asked = {} if number == 2 else {"metrics": METRICS} if number == 3 else {"outputs": True}
        asked = {"metrics": METRICS, "outputs": True} if number < 2 else asked
        result = pipe.train_step(inputs, targets, **asked)
        assert result.loss == loop.train_step(inputs, targets)
        outputs = loss.take()
        assert result.metrics == (by_hand(outputs, targets) if "metrics" in asked else {})
        if "outputs" in asked:
            assert torch.equal(result.outputs, outputs)
            assert (result.outputs.device.type, result.outputs.requires_grad) == ("cpu", False)
        else:
            assert result.outputs is None
        if number == 3:  # what an evaluation measures is its own
            assert list(pipe.evaluate([(inputs, targets)], {"other": correct})) == ["loss", "other"]
            assert isinstance(pipe.evaluate([(inputs, targets)]), float)
    assert_same_weights(pipe, loop.model)


@pytest.mark.parametrize(("schedule", "policy"), [("pipedream", "stash"), ("pipedream-2bw", "2bw")])
def test_those_of_a_stream(schedule: str, policy: str) -> None:
    loss = Recorded(cross_entropy)
    oracle, pipe = Versioned(mlp(dropout=0.3), sgd, loss, [4, 4]), pipeline(schedule=schedule, weights=policy)
    data = list(batches(3))
    expected = train(oracle, data, policy, 2, 3, flush_every=1)
    outputs = loss.take().split(10)
    for (inputs, targets), value, output in zip(data, expected, outputs, strict=True):
        result = pipe.train_step(inputs, targets, METRICS, outputs=True)
        assert result.loss == value
        assert torch.equal(result.outputs, output)
        assert result.metrics == by_hand(output, targets)
    [result] = pipe.train(data[:1])
    assert (result.metrics, result.outputs) == ({}, None)
    assert_same_weights(pipe, _after(oracle, data, policy))


def _after(oracle: Versioned, data: Any, policy: str) -> nn.Module:
    train(oracle, data[:1], policy, 2, 3)
    return oracle.model


def test_calls_of_an_accumulation_and_low_precision_have_their_own() -> None:
    for arguments in ({"accumulate": 2}, {"autocast": torch.bfloat16}, {"autocast": torch.float16, "accumulate": 2}):
        asked, silent = pipeline(**arguments), pipeline(**arguments)
        for inputs, targets in batches(4):
            result = asked.train_step(inputs, targets, metrics=METRICS, outputs=True)
            assert result.loss == silent.train_step(inputs, targets).loss
            assert result.metrics["correct"] == by_hand(result.outputs.float(), targets)["correct"]
            assert result.outputs.dtype == arguments.get("autocast", torch.float32)
        assert all(map(torch.equal, asked.state_dict().values(), silent.state_dict().values()))


def broken(output: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    raise KeyError("no such metric")


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_a_metric_that_fails_fails_the_step_and_changes_nothing(schedule: str) -> None:
    pipe, [(inputs, targets)] = pipeline(schedule=schedule, balance=[4, 4]), batches(1)
    before = pipe.state_dict()
    for metrics, error, message in (
        ({"broken": broken}, KeyError, "no such metric"),
        ({"bad": lambda output, target: output}, rp.ArgumentError, "metric 'bad' must return"),
        ({"none": None}, rp.ArgumentError, r"metrics\['none'\] must be a function"),
    ):
        with pytest.raises(error, match=message):
            pipe.train_step(inputs, targets, metrics=metrics)
        assert all(map(torch.equal, pipe.state_dict().values(), before.values()))
    assert pipe.train_step(inputs, targets).applied
