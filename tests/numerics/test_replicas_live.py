"""Replicas under everything else a pipeline does: live changes, evaluation, functions on stages, figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import DistributedOptimizer

import rpcpipe as rp
from rpcpipe.schedules import weight_versions
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd
from support.replicas import assert_all_replicas_are, make, oracle, states, train_both


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("kind", ["local", "rpc"])
def test_the_schedule_changes_in_a_live_run_and_the_bits_stay(
    kind: str, shard: bool, request: pytest.FixtureRequest
) -> None:
    """Sharded moments go to whoever owns their parameter then."""
    where: Any = LocalCluster(4, 3) if kind == "local" else request.getfixturevalue("cluster")
    pipe, ours = make(where, chunks=4, shard_optimizer=shard), oracle(4)
    names = ["gpipe", "zb-v", "interleaved", "zb-h1", "dualpipe-v", "1f1b"]
    for batch, name in zip(batches(len(names), 16), names, strict=True):
        assert pipe.train_step(*batch).loss == ours.train_step(*batch)
        pipe.schedule = name
    with pytest.raises(rp.ScheduleError, match="'pipedream' updates each replica's weights at its own times"):
        pipe.schedule = "pipedream"
    train_both(pipe, ours, size=16)
    pipe.close()


def test_forward_only_evaluate_and_weights(cluster: rp.Cluster) -> None:
    pipe, model = make(cluster), mlp().eval()
    data = list(batches(3, 7))
    with torch.no_grad():
        torch.testing.assert_close(pipe(data[0][0]), model(data[0][0]))
        torch.testing.assert_close(pipe(data[0][0][:1]), model(data[0][0][:1]))
        expected = sum(cross_entropy(model(x), y).item() for x, y in data) / 3
    assert pipe.evaluate(data) == pytest.approx(expected, rel=1e-6)
    found = pipe.evaluate(data, {"accuracy": lambda out, y: ((out.argmax(1) == y).sum(), len(y))})
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data) / 21
    assert found == {"loss": pytest.approx(expected, rel=1e-6), "accuracy": pytest.approx(right)}
    other = mlp()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    pipe.load_state_dict(other.state_dict())
    assert_all_replicas_are(pipe, other)
    assert list(pipe.state_dict()) == list(other.state_dict())
    pipe.close()


def jitter(module: nn.Module) -> float:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return float(parameter.detach().sum())


def test_a_function_on_a_stage_changes_all_replicas_alike(cluster: rp.Cluster) -> None:
    pipe = make(cluster)
    before = states(pipe, 0)
    assert pipe.stages[1].call(jitter) != pipe.stages[1].call(jitter)
    assert all(map(torch.equal, states(pipe, 0), states(pipe, 1)))
    assert not all(map(torch.equal, before, states(pipe, 0)))
    pipe.stages[0].call(lambda module: module.requires_grad_(False) and None)
    before = states(pipe, 0)
    pipe.train_step(*next(batches(1)))
    first = len(list(mlp()[: len(pipe.stages[0].layers)].parameters()))
    assert all(map(torch.equal, before[:first], states(pipe, 0)[:first]))
    assert not any(map(torch.equal, before[first:], states(pipe, 0)[first:]))
    assert all(map(torch.equal, states(pipe, 0), states(pipe, 1)))
    pipe.close()


def test_torchs_distributed_optimizer_updates_all_replicas(cluster: rp.Cluster) -> None:
    pipe, ours = make(cluster), oracle(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    for batch in batches(2):
        with pipe.step() as step:
            optimizer = DistributedOptimizer(torch.optim.SGD, pipe.parameter_rrefs(), lr=0.1)
            assert step.forward_backward(*batch) == ours.train_step(*batch)
            optimizer.step(step.context_id)
    assert_all_replicas_are(pipe, ours.model)
    pipe.close()
    pipe = make(cluster, shard_optimizer=True)
    with pytest.raises(rp.StateError, match="lies on one replica only"):
        pipe.parameter_rrefs()
    with pipe.step() as step:
        step.forward_backward(*batch)
        step.optimize()
    pipe.close()


def test_learning_rate_schedulers(cluster: rp.Cluster) -> None:
    pipe, ours = make(cluster, optimizer=sgd, shard_optimizer=True), oracle(optimizer=sgd)
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 1, gamma=0.5) for one in (pipe.optimizer, ours.optimizer)]
    for batch in batches(3):
        pipe.train_step(*batch)
        ours.train_step(*batch)
        for scheduler in schedulers:
            scheduler.step()
    train_both(pipe, ours)
    pipe.close()


def test_figures_tables_and_traces(cluster: rp.Cluster) -> None:
    pipe = make(cluster, chunks=4, checkpoint="always")
    batch = next(batches(1, 16))
    pipe.train_step(*batch)
    with pipe.trace() as timeline:
        result = pipe.train_step(*batch)
    assert result.peak_in_flight == (2, 1)  # of each replica
    assert result.recomputed == (2 * 4 * 4, 2 * 4 * 4)  # layers, micro-batches, both replicas
    assert len(result.peak_activation_bytes) == 2
    assert result.timeline.workers == 4
    assert {(span.worker, span.stage) for span in result.timeline.spans} == {(0, 0), (1, 0), (2, 1), (3, 1)}
    assert {(s.worker, s.chunk) for s in result.timeline.spans if s.kind == "F" and s.stage == 1} == {
        (worker, chunk) for worker, first in ((2, 0), (3, 4)) for chunk in range(first, first + 4)
    }
    assert {(t.source, t.target) for t in timeline.transfers} == {(0, 2), (2, 0), (1, 3), (3, 1)}
    assert len(timeline.transfers) == 2 * 8
    assert [span.kind for span in timeline.spans].count("U") == 4
    table = repr(pipe)
    assert "2 stages in 2 replicas" in table
    assert "1 of replica 1  worker3" in table
    assert repr(pipe.stages[1]).startswith("stage 1 on worker2, worker3 (cpu): layers 4 … 7")
    assert len(repr(result).splitlines()) == 2 + 2
    pipe.close()
    pipe = make(cluster, replicas=1)
    assert "replica" not in repr(pipe)
    pipe.close()


# --- refusals ---


def test_what_does_not_fit_is_refused(cluster: rp.Cluster) -> None:
    for name in weight_versions.POLICIES:
        with pytest.raises(rp.ScheduleError, match=f"{name!r} updates each replica's weights at its own times"):
            make(cluster, schedule=name)
    with pytest.raises(rp.PartitionError, match="4 workers do not divide into 3 replicas"):
        make(cluster, replicas=3)
    with pytest.raises(rp.PartitionError, match="4 stages in 2 replicas need 8 workers, the cluster has 4"):
        make(cluster, balance=[2, 2, 2, 2])
    with pytest.raises(ValueError, match="replicas must be at least 1, not 0"):
        make(cluster, replicas=0)
    pipe = make(cluster, balance=[8], replicas=3)  # and leaves a worker to others
    train_both(pipe, oracle(replicas=3))
    pipe.close()
