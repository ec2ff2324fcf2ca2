"""Forward only: equal to the unsplit model, full across batches, and nothing torn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rpcpipe as rp
from rpcpipe.worker.actor import Actor
from rpcpipe.worker.messages import Route
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd, summed
from support.oracle import Oracle
from support.seeds import some


def correct(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (output.argmax(-1) == target).sum(), len(target)


def largest(output: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Counts only where the target is 3."""
    kept = output[target == 3]
    return float(kept.max(-1).values.sum()), float(len(kept))


def local(seed: int = 0, **arguments: Any) -> rp.Pipeline:
    return rp.Pipeline(mlp(), LocalCluster(3, seed), optimizer=sgd, **{"loss": cross_entropy, "chunks": 3, **arguments})


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v", "pipedream"])
def test_equals_the_unsplit_model_in_any_order_of_messages(schedule: str, dispatch: str) -> None:
    model = mlp(dropout=0.3).eval()
    data = [next(batches(1, size)) for size in (7, 10, 1, 2, 9, 6)]
    with torch.no_grad():
        outputs = [torch.cat([model(part) for part in x.chunk(3)]) for x, _ in data]
    targets = torch.cat([y for _, y in data])
    losses = [cross_entropy(output, y) * len(y) for output, (_, y) in zip(outputs, data, strict=True)]
    hits = (torch.cat(outputs).argmax(-1) == targets).sum()
    for seed in some(range(8), 2):
        pipe = local(seed, schedule=schedule, dispatch=dispatch)
        assert all(map(torch.equal, pipe.predict(x for x, _ in data), outputs))
        found = pipe.evaluate(data, {"accuracy": correct, "largest": largest})
        assert list(found) == ["loss", "accuracy", "largest"]
        assert found["loss"] == pytest.approx(float(sum(losses)) / len(targets), rel=1e-6)
        assert found["accuracy"] == pytest.approx(int(hits) / len(targets))
        expected = torch.cat(outputs)[targets == 3].max(-1).values.mean()
        assert found["largest"] == pytest.approx(float(expected), rel=1e-6)
        assert pipe.evaluate(data) == found["loss"]


def test_a_loss_of_sums_is_weighed_by_its_counts() -> None:
    data = list(batches(3, 7))
    with torch.no_grad():
        sums = [summed(mlp().eval()(x), y) for x, y in data]
    expected = sum(float(value) for value, _ in sums) / sum(int(count) for _, count in sums)
    assert local(loss=summed).evaluate(data) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_stage_0_is_batches_ahead_of_what_was_collected(chunks: int) -> None:
    """The pipeline does not drain between batches: it holds the next ones while one is awaited."""
    taken: list[int] = []

    def endless() -> Iterator[torch.Tensor]:
        while True:
            taken.append(1)
            yield torch.randn(8, 12)

    outputs = local(chunks=chunks).predict(endless())
    next(outputs)
    ahead = len(taken) - 1
    assert ahead * chunks >= 3  # workers
    assert (ahead - 1) * chunks < 5


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
def test_a_failure_drops_all_that_is_under_way(dispatch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, armed = Actor._run_action, [True]

    def fail_once(self: Actor, route: Route, *more: Any) -> Any:
        if route.action == rp.schedules.Action("F", 1, 2) and armed[0]:
            armed[0] = False
            raise ArithmeticError("once")
        return act(self, route, *more)

    monkeypatch.setattr(Actor, "_run_action", fail_once)
    data = list(batches(6))
    for seed in some(range(12), 4):
        armed[0] = False
        pipe, oracle = local(seed, dispatch=dispatch), Oracle(mlp(), sgd, cross_entropy, 3)
        armed[0] = True
        with pytest.raises(ArithmeticError, match="once"):
            pipe.evaluate(data)
        for batch in batches(2):
            assert pipe.train_step(*batch).loss == oracle.train_step(*batch)


def test_what_is_left_early_or_raises_leaves_the_pipeline_usable() -> None:
    def broken() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from batches(4)
        raise OSError("no more data")

    for seed in some(range(8), 3):
        pipe, oracle = local(seed), Oracle(mlp(), sgd, cross_entropy, 3)
        with pytest.raises(OSError, match="no more data"):
            pipe.evaluate(broken())
        for _ in pipe.predict(x for x, _ in batches(9)):
            break
        with pytest.raises(rp.ArgumentError, match="3 micro-batches and targets 1"):
            pipe.evaluate([next(batches(1)), (torch.randn(6, 12), torch.zeros(1))])
        assert pipe.train_step(*next(batches(1))).loss == oracle.train_step(*next(batches(1)))


def test_no_other_step_meanwhile() -> None:
    pipe = local()
    outputs = pipe.predict(x for x, _ in batches(9))
    next(outputs)
    with pytest.raises(rp.StateError, match="finish the iterator of predict"):
        pipe.train_step(*next(batches(1)))
    with pytest.raises(rp.StateError, match="forward only"):
        pipe.optimizer.step()
    assert len(pipe.state_dict()) == 16  # but questions are answered, in their place
    assert len(list(outputs)) == 8
    assert pipe.train_step(*next(batches(1))).applied


def test_metrics_that_cannot_be_are_refused() -> None:
    pipe, data = local(), list(batches(1))
    with pytest.raises(rp.ArgumentError, match="'loss'"):
        pipe.evaluate(data, {"loss": correct})
    with pytest.raises(rp.ArgumentError, match="metric 'mean' must return"):
        pipe.evaluate(data, {"mean": lambda output, target: output.mean()})
    assert pipe.evaluate(data) > 0
