"""The user's API on real processes."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.worker.executor import Executor
from support.models import batches, cross_entropy, mlp, sgd
from support.oracle import Oracle, assert_same_weights


@pytest.fixture
def pipe(cluster: rp.Cluster) -> Any:
    made = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=3)
    yield made
    made.close()


def test_peak_in_flight_measured_on_the_workers(cluster: rp.Cluster) -> None:
    expected = {"naive": (1, 1, 1, 1), "gpipe": (8, 8, 8, 8), "1f1b": (4, 3, 2, 1)}
    for schedule, peaks in expected.items():
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, schedule=schedule, chunks=8)
        result = pipe.train_step(*next(batches(1, 16)))
        assert result.peak_in_flight == peaks
        assert 0 < result.bubble < 1
        assert len(result.timeline.spans) == 2 * 8 * 4
        pipe.close()


def test_the_executed_trace_respects_the_dependencies(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=6)
    timeline = pipe.train_step(*next(batches(1, 12))).timeline
    end = {rp.schedules.Action(s.kind, s.stage, s.chunk): s.end for s in timeline.spans}  # type: ignore[arg-type]
    for span in timeline.spans:
        for needed in pipe.schedule.dependencies(rp.schedules.Action(span.kind, span.stage, span.chunk)):  # type: ignore[arg-type]
            assert span.start >= end[needed]
    pipe.close()


@pytest.mark.parametrize(("size", "sizes"), [(10, [4, 4, 2]), (2, [1, 1]), (1, [1]), (7, [3, 3, 1])])
def test_batches_that_chunks_do_not_divide(pipe: rp.Pipeline, size: int, sizes: list[int]) -> None:
    oracle = Oracle(mlp(), sgd, cross_entropy, 3)
    for inputs, targets in batches(3, size):
        assert [len(part) for part in inputs.chunk(3)] == sizes
        assert pipe.train_step(inputs, targets).loss == oracle.train_step(inputs, targets)
    assert_same_weights(pipe, oracle.model)


def test_shapes_may_change_from_step_to_step(cluster: rp.Cluster) -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9))

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    pipe = rp.Pipeline(model, cluster, loss=loss, optimizer=sgd, chunks=2, balance=[1, 1, 1])
    for size, time in [(4, 5), (3, 2), (5, 11)]:
        ids = torch.randint(0, 9, (size, time))
        assert pipe.train_step(ids, ids).loss > 0
    pipe.close()


class TwoInputs(nn.Module):
    """Nests in, nests out: a dict of tensors and a plain value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return self.linear(x["a"]), x["mask"], {"scale": x["scale"], "unused": x["a"].sum(), "none": None}


class Combine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: tuple[torch.Tensor, torch.Tensor, dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, mask, extra = x
        return self.linear(hidden).relu_() * extra["scale"], mask


def masked(output: tuple[torch.Tensor, torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
    return ((output[0] - target[0]) ** 2 * output[1]).mean()


def test_nests_of_tensors_travel(cluster: rp.Cluster) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(TwoInputs(), Combine())

    inputs = {"a": torch.randn(5, 4), "mask": torch.randint(0, 2, (5, 4)), "scale": 0.5}
    target = [torch.randn(5, 4)]
    pipe = rp.Pipeline(model(), cluster, loss=masked, optimizer=sgd, chunks=2, balance=[1, 1])
    reference = model()
    total = 0.0
    for rows in (slice(0, 3), slice(3, 5)):
        part = {"a": inputs["a"][rows], "mask": inputs["mask"][rows], "scale": 0.5}  # type: ignore[index]
        value = masked(reference(part), [target[0][rows]]) * (len(part["a"]) / 5)
        value.backward()  # type: ignore[no-untyped-call]
        total += value.item()
    assert pipe.train_step(inputs, target).loss == pytest.approx(total, rel=1e-6)
    sgd(list(reference.parameters())).step()
    assert_same_weights(pipe, reference)
    output, mask = pipe(inputs)
    assert output.shape == (5, 4)
    assert torch.equal(mask, inputs["mask"])  # type: ignore[arg-type]
    pipe.close()


def test_an_in_place_first_layer_and_a_frozen_stage(cluster: rp.Cluster) -> None:
    def model() -> nn.Sequential:
        layers = nn.Sequential(mlp()[0], nn.ReLU(inplace=True), mlp()[1], mlp()[-1])
        layers[0].requires_grad_(False)
        return layers

    pipe = rp.Pipeline(model(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2, balance=[1, 1, 1, 1])
    reference = model()
    trainable = [p for p in reference.parameters() if p.requires_grad]
    oracle = Oracle(reference, lambda params: sgd(trainable), cross_entropy, 2)
    inputs, targets = next(batches(1))
    for chunk, (x, y) in enumerate(zip(inputs.chunk(2), targets.chunk(2), strict=True)):
        (cross_entropy(oracle.forward(x, chunk), y) * (len(x) / len(inputs))).backward()  # type: ignore[no-untyped-call]
    oracle.optimizer.step()
    assert pipe.train_step(inputs, targets).applied
    assert_same_weights(pipe, reference)
    assert len(pipe.parameter_rrefs()) == len(trainable)
    pipe.close()


def test_forward_only_and_evaluate(pipe: rp.Pipeline) -> None:
    model = mlp().eval()
    data = list(batches(3, 7))
    with torch.no_grad():
        torch.testing.assert_close(pipe(data[0][0]), model(data[0][0]))
        expected = sum(cross_entropy(model(x), y).item() for x, y in data) / 3
    assert pipe.evaluate(data) == pytest.approx(expected, rel=1e-6)
    assert pipe(data[0][0]).requires_grad is False
    with pytest.raises(rp.ArgumentError, match="at least one batch"):
        pipe.evaluate([])


def test_train_yields_results(pipe: rp.Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    results = list(pipe.train(batches(3), progress=True))
    assert [result.step for result in results] == [0, 1, 2]
    assert "loss=" in capsys.readouterr().err


def test_state_dict_round_trip(pipe: rp.Pipeline) -> None:
    reference = mlp()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(1)
    pipe.load_state_dict(reference.state_dict())
    assert_same_weights(pipe, reference)
    state = dict(reference.state_dict())
    state["7.bias"] = torch.zeros(5)
    del state["0.0.weight"]
    with pytest.raises(rp.CheckpointError, match=r"missing \['0.0.weight'\].*wrong shape \['7.bias'\]"):
        pipe.load_state_dict(state)
    assert_same_weights(pipe, reference)


def test_optimize_by_hand(pipe: rp.Pipeline) -> None:
    oracle = Oracle(mlp(), sgd, cross_entropy, 3)
    for inputs, targets in batches(2):
        with pipe.step() as step:
            step.forward_backward(inputs, targets)
            step.optimize()
        oracle.train_step(inputs, targets)
    assert_same_weights(pipe, oracle.model)
    with pytest.raises(rp.StateError, match="no step is open"):
        pipe.optimizer.step()
    with pipe.step() as step:
        with pytest.raises(rp.StateError, match="forward_backward"):
            step.optimize()
        with pytest.raises(rp.StateError, match="open already"):
            pipe.train_step(inputs, targets)


def test_two_pipelines_live_on_one_cluster(cluster: rp.Cluster) -> None:
    pipes = [rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=c) for c in (2, 5)]
    oracles = [Oracle(mlp(), sgd, cross_entropy, c) for c in (2, 5)]
    for batch in batches(3):
        for pipe, oracle in zip(pipes, oracles, strict=True):
            assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
    pipes[0].close()
    pipes[0].close()
    with pytest.raises(rp.StateError, match="closed"):
        pipes[0].train_step(*batch)
    pipes[1].train_step(*batch)
    pipes[1].close()


def test_many_micro_batches_over_two_handler_threads(cluster: rp.Cluster) -> None:
    """200 micro-batches issued ahead; with blocking handlers any thread pool would be exhausted."""
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, schedule="gpipe", chunks=200)
    oracle = Oracle(mlp(), sgd, cross_entropy, 200)
    batch = next(batches(1, 200))
    assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
    pipe.close()


def big_layer() -> nn.Module:
    return nn.Linear(3600, 3600)


def test_the_driver_does_not_grow_with_a_model_of_specs(cluster: rp.Cluster) -> None:
    before = psutil.Process().memory_info().rss
    specs = [rp.LayerSpec(big_layer) for _ in range(4)]
    pipe = rp.Pipeline(specs, cluster, loss=nn.functional.mse_loss, optimizer=sgd, chunks=2)
    pipe.train_step(torch.randn(2, 3600), torch.randn(2, 3600))
    assert sum(stage.call(_bytes) for stage in pipe.stages) > 200e6
    assert psutil.Process().memory_info().rss - before < 50e6
    pipe.close()


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_specs_do_not_depend_on_the_cut(cluster: rp.Cluster) -> None:
    specs = [rp.LayerSpec(nn.Linear, 4, 4) for _ in range(4)]
    states = []
    for balance in ([4], [1, 3], [1, 1, 1, 1]):
        pipe = rp.Pipeline(specs, cluster, loss=cross_entropy, optimizer=sgd, balance=balance)
        states.append(pipe.state_dict())
        pipe.close()
    for state in states[1:]:
        assert all(torch.equal(states[0][name], value) for name, value in state.items())


def test_calls_on_workers_and_stages(cluster: rp.Cluster, pipe: rp.Pipeline) -> None:
    assert cluster.call("worker2", os.getpid) == cluster.workers[2].pid
    assert cluster.call(1, lambda a, b: a + b, 2, 3) == 5
    assert cluster.call_all(os.getpid) == {worker.name: worker.pid for worker in cluster.workers}
    with pytest.raises(ZeroDivisionError, match="worker0"):
        cluster.call_all(lambda a: 1 / a, 0)
    assert pipe.stages[3].call(lambda module: module[-1].out_features) == 4
    with pytest.raises(rp.StageError, match="ZeroDivisionError"):
        cluster.call(cluster.workers[0], lambda: 1 / 0)
    with pytest.raises(ValueError, match="no worker 'worker9'"):
        cluster.call("worker9", os.getpid)
    assert "stage 1 on worker1 (cpu): layers 2 … 3" in repr(pipe.stages[1])
    assert "worker3" in repr(cluster)


def test_a_cluster_that_has_formed_knows_the_state_of_every_worker() -> None:
    with rp.launch(workers=1, threads=1, spares=1) as cluster:
        shown = repr(cluster)
    assert shown.count(" idle") == 2
    assert shown.count(" MiB ") == 2


def test_targets_of_another_size_are_refused(pipe: rp.Pipeline) -> None:
    with pytest.raises(ValueError, match="3 micro-batches and targets 1"):
        pipe.train_step(torch.randn(6, 12), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="dimension 0"):
        pipe.train_step({"a": torch.randn(6, 12), "b": torch.randn(5, 12)}, torch.zeros(6))


def test_layers_and_losses_defined_in_a_function_travel(cluster: rp.Cluster) -> None:
    class Local(nn.Linear):
        pass

    pipe = rp.Pipeline(
        [Local(4, 4), rp.LayerSpec(Local, 4, 4)], cluster, loss=lambda out, target: (out - target).square().mean(),
        optimizer=sgd, balance=[1, 1],
    )  # fmt: skip
    assert pipe.train_step(torch.randn(4, 4), torch.randn(4, 4)).applied
    pipe.close()


def test_launch_again_returns_the_live_cluster_if_it_fits(cluster: rp.Cluster) -> None:
    assert rp.launch(workers=4, threads=1, timeout=20.0) is cluster
    other = rp.launch(workers=1)
    with pytest.raises(rp.StateError, match="the cluster is closed"):
        cluster.call("worker0", os.getpid)
    other.close()
    other.close()


class Unpicklable(nn.Module):
    """Its output cannot leave the worker."""

    def forward(self, x: torch.Tensor) -> Any:
        return x, threading.Lock()


def test_what_cannot_travel_is_an_error_with_the_stage(cluster: rp.Cluster) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Unpicklable(), nn.Linear(4, 4))
    pipe = rp.Pipeline(model, cluster, loss=nn.functional.mse_loss, optimizer=sgd, balance=[2, 1], chunks=2)
    with pytest.raises(rp.StageError, match="pickle") as caught:
        pipe.train_step(torch.randn(4, 4), torch.randn(4, 4))
    assert (caught.value.stage, caught.value.action) == (0, "forward")
    pipe.close()
    pipe = rp.Pipeline(model[:2], cluster, loss=nn.functional.mse_loss, optimizer=sgd, balance=[2], chunks=2)
    with pytest.raises(
        rp.ModelError, match=r"on worker0 raised rpcpipe.errors.ModelError: the output of layer 1 has a lock"
    ):
        pipe(torch.randn(4, 4))
    pipe.close()


class Moody:
    """Cannot be built without memory: it reads a value."""

    def __new__(cls) -> nn.Module:  # type: ignore[misc]
        return nn.Dropout(torch.linspace(0, 0.5, 3)[1].item())


def test_specs_that_meta_cannot_build_need_a_balance(cluster: rp.Cluster) -> None:
    model = [rp.LayerSpec(nn.Linear, 4, 4), rp.LayerSpec(Moody), rp.LayerSpec(nn.Linear, 4, 4), nn.ReLU()]
    with pytest.raises(rp.PartitionError, match=r"layer 1.*pass balance="):
        rp.Pipeline(model, cluster, loss=nn.functional.mse_loss, optimizer=sgd)
    pipe = rp.Pipeline(model, cluster, loss=nn.functional.mse_loss, optimizer=sgd, balance=[1, 1, 1, 1])
    assert pipe.train_step(torch.randn(4, 4), torch.randn(4, 4)).applied
    pipe.close()


def test_a_pipeline_that_is_dropped_frees_its_stages(cluster: rp.Cluster) -> None:
    def actors() -> int:
        return cluster.call(1, _actors)

    before = actors()
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd)
    assert actors() == before + 1
    del pipe
    gc.collect()
    assert actors() == before


def _actors() -> int:
    from rpcpipe.transport.rpc import this_process

    assert this_process.served is not None
    executor = this_process.served[1]
    assert isinstance(executor, Executor)
    return len(executor.actors)
