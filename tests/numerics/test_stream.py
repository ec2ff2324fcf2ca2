"""Asynchronous training: the same bits as a serial program that keeps every version of the weights."""

from __future__ import annotations

import itertools
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.stage import stream_rollback
from rpcpipe.stage.optimizer import LocalOptimizer
from rpcpipe.worker.actor import Actor
from support.helpers import (
    OPTIMIZERS,
    LocalCluster,
    adamw,
    assert_same_weights,
    batches,
    cross_entropy,
    mlp,
    sgd,
    summed,
)
from support.stream import POLICIES, SIZES, pipeline
from support.versioned import Versioned, train


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
    count = 50 if policy == "2bw" else -(-50 // chunks)
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


@pytest.mark.parametrize("seed", range(8))
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
        )  # type: ignore[arg-type]  # fmt: skip
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
    with pytest.raises(rp.StageError, match="must return the mean"):
        list(pipeline(3, "2bw", loss=summed).train(batches(3)))


# --- other calls while a stream is open ---


def test_evaluation_and_the_rest_see_one_consistent_version() -> None:
    """Each drains the stream, which goes on from there as after a flush."""
    pipe = pipeline(3, "stash")
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    fed: list[int] = []

    def counted() -> Iterator[Any]:
        for number, batch in enumerate(batches(24)):
            fed.append(number)
            yield batch

    flushed = []
    for result in pipe.train(counted()):
        if result.step == 7:
            loss = pipe.evaluate(batches(2))
            flushed.append(len(fed))
            assert pipe.trained == len(fed)
            state = {name: value.clone() for name, value in pipe.state_dict().items()}
    k = 0
    for number, (x, y) in enumerate(batches(24)):
        if number in flushed:
            model = mlp().eval()
            model.load_state_dict(state)
            expected = sum(cross_entropy(model(x2), y2).item() for x2, y2 in batches(2)) / 2
            assert loss == pytest.approx(expected, rel=1e-6)
            for name, value in oracle.model.state_dict().items():
                assert torch.equal(state[name], value)
            oracle.flush()
            k = 0
        k += 1
        oracle.step([(x, y, 1.0)], [max(0, k - (2 - r) - 1) for r in range(3)])
    assert flushed
    assert_same_weights(pipe, oracle.model)


def test_leaving_the_loop_finishes_what_was_fed() -> None:
    pipe = pipeline(3, "stash")
    for result in pipe.train(batches(30)):
        if result.step == 4:
            break
    assert pipe.trained == 10  # 5 results and the 5 batches fed ahead
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    train(oracle, batches(10), "stash", 3, 1)
    assert_same_weights(pipe, oracle.model)


def test_a_single_step_flushes_and_a_synchronous_schedule_takes_over() -> None:
    pipe = pipeline(2, "stash", chunks=2)
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[2])
    x, y = next(batches(1))
    assert pipe.train_step(x, y).loss == train(oracle, [(x, y)], "stash", 2, 2)[0]
    assert_same_weights(pipe, oracle.model)
    pipe.schedule = "1f1b"  # type: ignore[assignment]
    assert pipe.train_step(x, y).versions == ()
    pipe.schedule = "pipedream"  # type: ignore[assignment]
    assert pipe.train_step(x, y).versions != ()
    with pytest.raises(rp.ScheduleError, match="needs a synchronous schedule"):
        pipe.step()


def test_a_schedule_that_becomes_synchronous_ends_the_loop() -> None:
    pipe = pipeline(2, "stash")
    results = pipe.train(batches(20))
    next(results)
    pipe.schedule = "gpipe"  # type: ignore[assignment]
    with pytest.raises(rp.ScheduleError, match="has become 'gpipe', which does not stream"):
        list(results)
    assert pipe.train_step(*next(batches(1))).step == pipe.trained - 1


def test_closing_the_pipeline_in_the_loop_ends_it() -> None:
    pipe = pipeline(2, "stash")
    for result in pipe.train(batches(20)):
        if result.step == 3:
            pipe.close()
            break
    with pytest.raises(rp.RpcPipeError, match="the pipeline is closed"):
        pipe.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "vertical"}, "takes one of 'stash', 'vertical_sync', 'latest'"),
        ({"weights": "2bw"}, "does not fit schedule 'pipedream'"),
        ({"schedule": "1f1b", "weights": "stash"}, "takes None: its weights have one version"),
        ({"schedule": "pipedream-2bw", "chunks": 2}, "needs at least 3 micro-batches on 3 workers, not 2"),
        ({"flush_every": 0}, "flush_every must be at least 1, not 0"),
        ({"nonfinite": "ignore"}, "nonfinite must be 'skip' or 'stop'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"schedule": "pipedream", "chunks": 1} | change
    with pytest.raises(ValueError, match=message):
        rp.Pipeline(mlp(), LocalCluster(3), loss=cross_entropy, optimizer=sgd, **arguments)  # type: ignore[arg-type]


def test_a_batch_of_too_few_micro_batches_flushes_2bw() -> None:
    pipe = pipeline(3, "2bw")
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    sizes = [10, 10, 2, 10, 10, 10]
    data = [(x[:size], y[:size]) for size, (x, y) in zip(sizes, batches(6), strict=True)]
    losses = [result.loss for result in pipe.train(data)]
    expected = train(oracle, data[:3], "2bw", 3, 4)
    oracle.flush()
    assert losses == expected + train(oracle, data[3:], "2bw", 3, 4)
    assert_same_weights(pipe, oracle.model)


# --- what goes wrong ---


def poisoned(where: int, value: float = float("nan"), count: int = 12) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for number, (x, y) in enumerate(batches(count)):
        yield (x * value if number == where else x), y


@pytest.mark.parametrize("policy", POLICIES)
def test_a_loss_that_is_not_finite_is_skipped_on_every_stage(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline(3, policy)
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    with caplog.at_level(logging.WARNING, logger="rpcpipe"):
        results = list(pipe.train(poisoned(5)))
    assert [result.applied for result in results] == [number != 5 for number in range(12)]
    assert "step 5: loss or gradient is not finite" in caplog.text
    for number, (x, y) in enumerate(batches(12)):
        used = {
            "stash": [max(0, number + 1 - (2 - r) - 1) for r in range(3)],
            "vertical_sync": [max(0, number + 1 - 3)] * 3,
            "2bw": [max(0, number - 1)] * 3,
        }[policy]
        if number == 5:
            oracle.skip()
        else:
            parts = list(zip(x.chunk(pipe.chunks), y.chunk(pipe.chunks), strict=True))
            oracle.step([(a, b, len(a) / len(x)) for a, b in parts], used)
    assert_same_weights(pipe, oracle.model)


def test_or_the_run_stops_before_it() -> None:
    pipe = pipeline(3, "stash", nonfinite="stop")
    with pytest.raises(FloatingPointError, match=r"before number 5 .* are in the weights and numbers 5 to") as caught:
        list(pipe.train(poisoned(5)))
    assert isinstance(caught.value, rp.StageError)
    assert pipe.trained == 5
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    train(oracle, batches(5), "stash", 3, 1)
    assert_same_weights(pipe, oracle.model)


def test_a_synchronous_step_stops_as_well() -> None:
    pipe = rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2, nonfinite="stop")  # type: ignore[arg-type]
    before = pipe.state_dict()
    x, y = next(batches(1))
    with pytest.raises(FloatingPointError, match="gradient"):
        pipe.train_step(x * float("nan"), y)
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    assert pipe.trained == 0


class Fails(nn.Module):
    """Passes its input on; at the forward number ``at`` it raises, there or in the backward."""

    def __init__(self, phase: str, at: int) -> None:
        super().__init__()
        self.phase, self.at, self.calls = phase, at, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out = x + 0
        if self.calls - 1 == self.at:
            if self.phase == "forward":
                raise LookupError("not in the forward")
            out.register_hook(_refuse)
        return out


def _refuse(_: torch.Tensor) -> None:
    raise LookupError("not in the backward")


def failing(phase: str, layer: int, at: int) -> nn.Sequential:
    model = mlp()
    model[layer] = nn.Sequential(model[layer], Fails(phase, at))
    return model


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("phase", "layer"), [("forward", 0), ("forward", 5), ("backward", 3), ("backward", 6)])
@pytest.mark.parametrize("where", [0, 1, 40])
def test_a_failure_leaves_every_stage_at_the_same_minibatch(policy: str, phase: str, layer: int, where: int) -> None:
    """Nothing half-applied; which minibatches are in is reported exactly, and the pipeline goes on."""
    chunks = 4 if policy == "2bw" else 1
    pipe = pipeline(3, policy, model=failing(phase, layer, (where + 1) * chunks - 1))
    with pytest.raises(LookupError, match=f"not in the {phase}") as caught:
        list(pipe.train(batches(50)))
    # No stage has applied what failed in a forward, or in a backward of the last stage. Else all go
    # back to the last common copy.
    kept = where if phase == "forward" or layer > 5 else stream_rollback.newest(where)
    assert pipe.trained == kept
    assert f"before number {kept} (pipe.trained) are in the weights" in str(caught.value)
    oracle = Versioned(failing(phase, layer, -1), sgd, cross_entropy, SIZES[3])
    data = list(batches(50))
    train(oracle, data[:kept], policy, 3, chunks)
    assert_same_weights(pipe, oracle.model)
    oracle.flush()
    again = data[kept : kept + 6]
    assert [r.loss for r in pipe.train(again)] == train(oracle, again, policy, 3, chunks)
    assert_same_weights(pipe, oracle.model)


def test_an_optimizer_that_fails_on_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(3, "stash", optimizer=adamw)
    apply, calls = LocalOptimizer.apply, itertools.count()

    def flaky(self: LocalOptimizer, *args: Any) -> None:
        apply(self, *args)
        if len(self.parameters) == SIZES[3][1] * 2 and next(calls) == 35:  # the second stage's
            raise RuntimeError("no space left")

    monkeypatch.setattr(LocalOptimizer, "apply", flaky)
    with pytest.raises(rp.StageError, match=r"update of stage 1.*no space left"):
        list(pipe.train(batches(50)))
    assert pipe.trained == 32
    oracle = Versioned(mlp(), adamw, cross_entropy, SIZES[3])
    train(oracle, batches(32), "stash", 3, 1)
    assert_same_weights(pipe, oracle.model)


def test_a_lost_message_runs_into_the_deadline_and_all_stages_go_back_together() -> None:
    lost = iter([False] * 11 + [True])
    cluster: Any = LocalCluster(3, drop=lambda to, verb: verb == "deliver" and next(lost, False), timeout=0.2)
    pipe = pipeline(3, "stash", cluster)
    before = pipe.state_dict()
    with pytest.raises(rp.DeadlineExceeded, match="waits for the input of") as caught:
        list(pipe.train(batches(20)))
    assert "before number 0 (pipe.trained)" in caught.value.__notes__[0]
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    assert [r.loss for r in pipe.train(batches(6))] == train(oracle, batches(6), "stash", 3, 1)


def test_a_traced_stream_shows_updates_and_versions(cluster: rp.Cluster) -> None:
    pipe = pipeline(4, "stash", cluster)
    with pipe.trace() as timeline:
        list(pipe.train(batches(8)))
    drawn = rp.schedules.get("pipedream", 4, 8).simulate(rp.Costs(optimizer=0.5))

    def seen(of: rp.Timeline) -> list[list[tuple[str, int, int, int]]]:
        spans = sorted(of.spans, key=lambda span: span.start)
        return [[(s.kind, s.stage, s.chunk, s.version) for s in spans if s.worker == worker] for worker in range(4)]

    assert seen(timeline) == seen(drawn)
    assert len(timeline.transfers) == 8 * 3 * 2
    assert "█ update" in timeline.to_text()
    pipe.close()


def test_steady_state_throughput_is_one_over_the_slowest_stage() -> None:
    costs = rp.Costs(forward=[1, 2, 1.5], input_gradient=[1, 2, 1], weight_gradient=[1, 2.5, 1])
    ends = {n: rp.schedules.get("pipedream", 3, n).simulate(costs).makespan for n in (20, 60)}
    assert (ends[60] - ends[20]) / 40 == pytest.approx(6.5)


def test_a_worker_that_dies_in_mid_stream_is_named() -> None:
    with rp.launch(workers=2) as cluster:
        pipe = pipeline(2, "stash", cluster)

        def killing() -> Iterator[Any]:
            for number, batch in enumerate(batches(200)):
                if number == 20:
                    os.kill(cluster.workers[1].pid, signal.SIGKILL)
                yield batch

        with pytest.raises(rp.WorkerLost, match=r"worker1 .*SIGKILL"):
            list(pipe.train(killing()))
