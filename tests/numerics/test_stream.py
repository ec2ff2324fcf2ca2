"""Asynchronous training: the same bits as a serial program that keeps every version of the weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.stage.optimizer import LocalOptimizer
from rpcpipe.worker.actor import Actor
from support.local_cluster import LocalCluster
from support.models import OPTIMIZERS, adamw, batches, cross_entropy, mlp, sgd, summed
from support.oracle import Versioned, assert_same_weights, train
from support.seeds import some
from support.stream import POLICIES, SIZES, pipeline


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_fifty_minibatches_are_the_definitions_to_the_bit(stages: int, policy: str, optimizer: str) -> None:
    """Dropout on; every message shuffled; both dispatch modes and two numbers of micro-batches by turns."""
    turn = (stages + list(OPTIMIZERS).index(optimizer)) % 2
    chunks = ((4, 5) if policy == "2bw" else (1, 3))[turn]
    make, dispatch = OPTIMIZERS[optimizer], ("rref", "batched")[(turn + stages // 2) % 2]
    pipe = pipeline(stages, policy, optimizer=make, chunks=chunks, dispatch=dispatch)
    oracle = Versioned(mlp(), make, cross_entropy, SIZES[stages])
    count = -(-50 // chunks)
    results = list(pipe.train(batches(count)))
    assert [result.loss for result in results] == train(oracle, batches(count), policy, stages, chunks)
    assert_same_weights(pipe, oracle.model)
    assert pipe.trained == oracle.updates


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_through_rpc(cluster: rp.Cluster, policy: str, dispatch: str) -> None:
    pipe = pipeline(4, policy, cluster, optimizer=adamw, dispatch=dispatch, flush_every=9)
    oracle = Versioned(mlp(), adamw, cross_entropy, SIZES[4])
    losses = [result.loss for result in pipe.train(batches(25))]
    assert losses == train(oracle, batches(25), policy, 4, pipe.chunks, flush_every=9)
    assert_same_weights(pipe, oracle.model)
    pipe.close()


def test_a_stage_holds_as_many_versions_as_are_in_flight() -> None:
    for stages, (policy, most) in itertools.product(
        (1, 2, 4), {"stash": lambda r, n: n - r, "vertical_sync": lambda r, n: n, "2bw": lambda r, n: 2}.items()
    ):
        pipe = pipeline(stages, policy)
        *_, last = pipe.train(batches(20))
        sizes = [
            stage.call(lambda m: sum(p.numel() * p.element_size() for p in m.parameters())) for stage in pipe.stages
        ]
        assert last.peak_versions == tuple(most(r, stages) for r in range(stages)), policy
        assert last.peak_version_bytes == tuple(n * size for n, size in zip(last.peak_versions, sizes, strict=True))


def test_versions_share_memory_until_an_update_overwrites_one_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where the memory is: distinct storages behind the parameters and all leaves a graph holds."""
    alive: dict[int, int] = {}
    update = Actor._update

    def count(self: Actor, stage: Any, *args: Any) -> Any:
        report = update(self, stage, *args)
        memory = {p.data_ptr() for p in stage.parameters}
        memory |= {t.data_ptr() for aliases in stage.versions._held.values() for t in aliases.values()}
        alive[stage.index] = max(alive.get(stage.index, 0), len(memory) // len(stage.parameters))
        return report

    monkeypatch.setattr(Actor, "_update", count)
    list(pipeline(4, "stash").train(batches(20)))
    assert alive == {0: 4, 1: 3, 2: 2, 3: 1}


def test_results_say_which_versions_were_used() -> None:
    results = list(pipeline(3, "stash", chunks=2).train(batches(6)))
    assert results[0].versions == ((0, 0), (0, 0), (0, 1))
    assert results[4].step == 8
    assert results[4].versions == ((6, 7), (7, 8), (8, 9))
    assert results[4].staleness == (2, 1, 0)
    assert [result.staleness for result in pipeline(3, "vertical_sync").train(batches(6))][-1] == (2, 2, 2)


def test_naive_asynchrony_is_something_else_and_holds_one_version() -> None:
    states = {}
    for policy in ("stash", "latest"):
        pipe = pipeline(4, policy)
        *_, last = pipe.train(batches(30))
        states[policy] = pipe.state_dict()
        assert last.peak_versions == ((1, 1, 1, 1) if policy == "latest" else (4, 3, 2, 1))
    changed = [name for name, value in states["stash"].items() if not torch.equal(value, states["latest"][name])]
    assert len(changed) > len(states["stash"]) // 2
    alone = pipeline(1, "latest")
    oracle = Versioned(mlp(), sgd, cross_entropy, [8])
    assert [result.loss for result in alone.train(batches(9))] == train(oracle, batches(9), "stash", 1, 1)


@pytest.mark.parametrize("seed", some(range(8), 3))
def test_gradients_of_different_minibatches_never_mix(seed: int) -> None:
    """The loss of minibatch n is n times a sum, so every gradient says of whom it is."""

    def linear() -> nn.Sequential:
        layers = [nn.Linear(1, 1, bias=False) for _ in range(4)]
        for layer in layers:
            nn.init.ones_(layer.weight)
        return nn.Sequential(*layers)

    seen: dict[int, list[float]] = {}
    apply = LocalOptimizer.apply

    def record(self: LocalOptimizer, gradients: Any, changes: Any) -> None:
        (parameter,) = self.parameters
        seen.setdefault(id(self), []).append(float(gradients.get(parameter)))
        apply(self, gradients, changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalOptimizer, "apply", record)
        pipe = rp.Pipeline(
            linear(), LocalCluster(4, seed), loss=lambda out, y: (out * y).mean(), schedule="pipedream", chunks=1,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        )  # fmt: skip
        list(pipe.train((torch.ones(1, 1), torch.full((1, 1), float(n))) for n in range(1, 30)))
    assert list(seen.values()) == [[float(n) for n in range(1, 30)]] * 4


def test_learning_rates_and_clipping_hold_for_whole_minibatches() -> None:
    """A rate set on seeing a result holds on every stage for the batches fed from then on."""
    pipe = pipeline(3, "stash", clip_grad_norm=0.05)
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3], clip=0.05)
    rates: list[float] = []
    ahead = 0

    def noticing() -> Iterator[Any]:
        for batch in batches(20):
            rates.append(pipe.optimizer.param_groups[0]["lr"])
            yield batch

    for result in pipe.train(noticing()):
        ahead = max(ahead, len(rates) - result.step)
        pipe.optimizer.param_groups[0]["lr"] = 0.1 * 0.9**result.step
    assert ahead == 6  # itself and K + 2 = 5 that follow
    assert len(set(rates)) == 14
    for k, (rate, (x, y)) in enumerate(zip(rates, batches(20), strict=True), 1):
        oracle.optimizer.param_groups[0]["lr"] = rate
        oracle.step([(x, y, 1.0)], [max(0, k - (2 - r) - 1) for r in range(3)])
    assert_same_weights(pipe, oracle.model)


def test_schedulers_of_torch_see_their_optimizer_step(recwarn: pytest.WarningsRecorder) -> None:
    pipe = pipeline(2, "stash")
    scheduler = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 1, 0.5)
    for _ in pipe.train(batches(3)):
        scheduler.step()
    assert pipe.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert not recwarn.list


def test_a_loss_of_sum_and_count() -> None:
    pipe = pipeline(3, "stash", loss=summed)
    oracle = Versioned(mlp(), sgd, summed, SIZES[3])
    assert [r.loss for r in pipe.train(batches(9))] == pytest.approx(train(oracle, batches(9), "stash", 3, 1))
    assert_same_weights(pipe, oracle.model)
    with pytest.raises(rp.ScheduleError, match="must return the mean"):
        list(pipeline(3, "2bw", loss=summed).train(batches(3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "vertical"}, "takes one of 'stash', 'vertical_sync', 'latest'"),
        ({"weights": "2bw"}, "does not fit schedule 'pipedream'"),
        ({"schedule": "1f1b", "weights": "stash"}, "takes None: its weights have one version"),
        ({"schedule": "pipedream-2bw", "chunks": 2}, "needs at least 3 micro-batches on 3 workers, not 2"),
        ({"flush_every": 0}, "flush_every must be at least 1, or None for never, not 0"),
        ({"nonfinite": "ignore"}, "nonfinite must be 'skip' or 'stop'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"schedule": "pipedream", "chunks": 1} | change
    with pytest.raises(ValueError, match=message):
        rp.Pipeline(mlp(), LocalCluster(3), loss=cross_entropy, optimizer=sgd, **arguments)  # type: ignore[arg-type]


def test_a_traced_stream_shows_updates_and_versions(cluster: rp.Cluster) -> None:
    pipe = pipeline(4, "stash", cluster)
    with pipe.trace() as timeline:
        list(pipe.train(batches(8)))
    drawn = rp.schedules.get("pipedream", 4, 8).simulate(rp.schedules.Costs(optimizer=0.5))

    def seen(of: rp.schedules.Timeline) -> list[list[tuple[str, int, int, int]]]:
        spans = sorted(of.spans, key=lambda span: span.start)
        return [[(s.kind, s.stage, s.chunk, s.version) for s in spans if s.worker == worker] for worker in range(4)]

    assert seen(timeline) == seen(drawn)
    assert len(timeline.transfers) == 8 * 3 * 2
    assert "█ update" in timeline.to_text()
    pipe.close()


def test_steady_state_throughput_is_one_over_the_slowest_stage() -> None:
    costs = rp.schedules.Costs(forward=[1, 2, 1.5], input_gradient=[1, 2, 1], weight_gradient=[1, 2.5, 1])
    ends = {n: rp.schedules.get("pipedream", 3, n).simulate(costs).makespan for n in (20, 60)}
    assert (ends[60] - ends[20]) / 40 == pytest.approx(6.5)
