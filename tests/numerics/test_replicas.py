"""2D: pipelines in several replicas, equal to one process; gradients summed, optimizers sharded."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import DistributedOptimizer

import rpcpipe as rp
from rpcpipe.driver.program import Layout
from rpcpipe.schedules import weight_versions
from rpcpipe.stage.optimizer import LocalOptimizer
from support.helpers import OPTIMIZERS, LocalCluster, Oracle, adamw, batches, cross_entropy, mlp, sgd, summed

LOOPED = ("interleaved", "looped-bfs")
SYNCHRONOUS = [name for name in rp.schedules.names() if name not in weight_versions.POLICIES]


def make(cluster: Any, model: nn.Module | None = None, **arguments: Any) -> rp.Pipeline:
    given: dict[str, Any] = {"loss": cross_entropy, "optimizer": adamw, "chunks": 3, "replicas": 2, **arguments}
    return rp.Pipeline(model or mlp(), cluster, **given)


def states(pipe: rp.Pipeline, replica: int) -> list[torch.Tensor]:
    """All weights of one replica, by way of its workers."""
    driver = pipe._driver
    found = driver.collect({name: driver.post(name, "state_dict") for name in pipe._layout.row(replica)})
    by_stage = {stage: state for stages in found.values() for stage, state in stages.items()}
    return [value for stage in sorted(by_stage) for value in by_stage[stage].values()]


def assert_all_replicas_are(pipe: rp.Pipeline, model: nn.Module) -> None:
    wanted = list(model.state_dict().values())
    for replica in range(pipe._layout.replicas):
        for have, want in zip(states(pipe, replica), wanted, strict=True):
            assert torch.equal(have, want), f"replica {replica} differs by {(have - want).abs().max()}"


def train_both(pipe: rp.Pipeline, oracle: Oracle, steps: int = 3, size: int = 10) -> None:
    for inputs, targets in batches(steps, size):
        result = pipe.train_step(inputs, targets)
        assert result.loss == oracle.train_step(inputs, targets)
        assert result.grad_norm == oracle.grad_norm
    assert_all_replicas_are(pipe, oracle.model)


def oracle(chunks: int = 3, optimizer: Any = adamw, loss: Any = cross_entropy, **more: Any) -> Oracle:
    return Oracle(mlp(), optimizer, loss, chunks, **{"replicas": 2, **more})


# --- the same numbers as one process ---


@pytest.mark.parametrize("schedule", SYNCHRONOUS)
def test_same_bits_in_any_order_of_messages(schedule: str) -> None:
    """Replicas' bits are those of one process that sums each share's gradients by themselves; by turns sharded."""
    seed = SYNCHRONOUS.index(schedule) % 2
    for workers, replicas in ((1, 2), (2, 2), (3, 2), (2, 3)):
        for virtual in (2, 3)[: 8 // workers - 1] if schedule in LOOPED else (1,):
            seed += 1
            chunks = 2 * workers + seed % 2
            pipe = make(
                LocalCluster(workers * replicas, seed), schedule=schedule, chunks=chunks, virtual_stages=virtual,
                replicas=replicas, shard_optimizer=seed % 2 == 0, dispatch=("rref", "batched")[seed // 2 % 2],
            )  # fmt: skip
            train_both(pipe, oracle(chunks, replicas=replicas), 2, replicas * chunks + seed % 3)


@pytest.mark.parametrize("schedule", SYNCHRONOUS)
def test_same_bits_through_rpc(cluster: rp.Cluster, schedule: str) -> None:
    """K = 2, R = 2; by turns plain and sharded, call by call and batched."""
    at = SYNCHRONOUS.index(schedule)
    pipe = make(
        cluster, schedule=schedule, chunks=4, virtual_stages=2 if schedule in LOOPED else 1,
        shard_optimizer=at % 2 == 0, dispatch=("rref", "batched")[at // 2 % 2],
    )  # fmt: skip
    assert [stage.workers for stage in pipe.stages][:2] == [("worker0", "worker1"), ("worker2", "worker3")]
    train_both(pipe, oracle(4), size=16)
    pipe.close()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("loss", [cross_entropy, summed])
def test_equals_a_plain_loop_over_all_micro_batches(loss: Any, clip: float | None) -> None:
    """In double precision nearly to the bit: only the order of summation differs. Dropout included."""
    steps: list[tuple[Any, Any]] = [(x.double(), y) for x, y in batches(3, 11)]
    for optimizer in OPTIMIZERS.values():
        pipe = make(LocalCluster(4, 5), mlp().double(), loss=loss, optimizer=optimizer, clip_grad_norm=clip)
        plain = Oracle(mlp().double(), optimizer, loss, 3, replicas=2, plain=True, clip=clip)
        for batch in steps:
            result = pipe.train_step(*batch)
            # Norms, and so what is clipped, are computed in single precision.
            assert result.loss == pytest.approx(plain.train_step(*batch), rel=1e-6 if clip else 1e-12)
            assert result.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)
        for replica in range(2):
            for have, want in zip(states(pipe, replica), plain.model.state_dict().values(), strict=True):
                torch.testing.assert_close(have, want, rtol=1e-6 if clip else 1e-11, atol=1e-9 if clip else 1e-11)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize(
    ("size", "counts"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (4, (2, 2, 0)), (7, (2, 2, 1)), (9, (2,) * 3)]
)
def test_batches_of_any_size(size: int, counts: tuple[int, ...], shard: bool) -> None:
    """A replica without a micro-batch takes part in the sums and the update."""
    pipe = make(LocalCluster(6, size), chunks=2, replicas=3, shard_optimizer=shard)
    ours = Oracle(mlp(), adamw, cross_entropy, 2, replicas=3)
    assert pipe._program.cut(torch.empty(size, 1)).counts == counts
    for batch in batches(3, size):
        assert pipe.train_step(*batch).loss == pytest.approx(ours.train_step(*batch), rel=1e-6)
    assert_all_replicas_are(pipe, ours.model)


def test_two_runs_give_the_same_bits() -> None:
    def run(seed: int) -> list[float]:
        pipe = make(LocalCluster(6, seed), replicas=3)
        return [pipe.train_step(*batch).loss for batch in batches(3, 20)]

    assert run(1) == run(2)


def test_clipping_and_a_loss_of_sum_and_count_through_rpc(cluster: rp.Cluster) -> None:
    for shard in (False, True):
        pipe = make(cluster, loss=summed, clip_grad_norm=0.05, shard_optimizer=shard)
        train_both(pipe, oracle(loss=summed, clip=0.05))
        pipe.close()


@pytest.mark.parametrize("shard", [False, True])
def test_gradients_that_accumulate(shard: bool) -> None:
    """Two calls make one update; the norm so far is that of all replicas."""
    pipe = make(LocalCluster(4, 3), mlp(dropout=0.0).double(), accumulate=2, shard_optimizer=shard, chunks=2)
    whole = make(LocalCluster(4, 4), mlp(dropout=0.0).double(), chunks=2)
    for x, y in batches(3, 16):
        x = x.double()
        first, second = (pipe.train_step(x[part], y[part]) for part in (slice(8), slice(8, 16)))
        once = whole.train_step(x, y)
        assert (first.applied, second.applied) == (False, True)
        assert 0 < first.grad_norm < once.grad_norm * 2
        assert second.grad_norm == pytest.approx(once.grad_norm, rel=1e-6)
    for have, want in zip(states(pipe, 0), states(whole, 0), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-11)
    assert all(map(torch.equal, states(pipe, 0), states(pipe, 1)))


@pytest.mark.parametrize("shard", [False, True])
def test_the_loss_scale_of_half_precision(cluster: rp.Cluster, shard: bool) -> None:
    pipe = make(cluster, autocast=torch.float16, shard_optimizer=shard)
    alone = rp.Pipeline(
        mlp(), cluster, loss=cross_entropy, optimizer=adamw, chunks=6, balance=[8], autocast=torch.float16
    )
    for batch in batches(3, 12):
        results = [one.train_step(*batch) for one in (pipe, alone)]
        assert results[0].loss_scale == results[1].loss_scale > 1
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-3)
        assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-3)
    assert all(map(torch.equal, states(pipe, 0), states(pipe, 1)))
    pipe.close()
    alone.close()


def test_a_frozen_stage_and_frozen_parameters() -> None:
    def model() -> nn.Sequential:
        layers = mlp()
        layers[:4].requires_grad_(False)
        layers[5][0].bias.requires_grad_(False)
        return layers

    for shard in (False, True):
        pipe = make(LocalCluster(4, 2), model(), balance=[4, 4], shard_optimizer=shard)
        reference = model()
        trainable = [p for p in reference.parameters() if p.requires_grad]
        ours = Oracle(reference, lambda _: adamw(trainable), cross_entropy, 3, replicas=2, plain=True)  # noqa: B023
        for batch in batches(3, 12):
            assert pipe.train_step(*batch).loss == pytest.approx(ours.train_step(*batch), rel=1e-5)
        assert all(map(torch.equal, states(pipe, 0), states(pipe, 1)))
        for have, want in zip(states(pipe, 0), reference.state_dict().values(), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


# --- faults ---


def fail_on_nan(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if inputs[0].isnan().any():
        raise ArithmeticError("NaN in the input")


def failing() -> nn.Sequential:
    layers = mlp()
    layers[5].register_forward_pre_hook(fail_on_nan)
    return layers


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_an_error_in_one_replica_cancels_the_step_in_all(seed: int, shard: bool) -> None:
    pipe = make(LocalCluster(4, seed), failing(), shard_optimizer=shard)
    ours = oracle()
    for batch in batches(3):
        poisoned = batch[0].clone()
        poisoned[5 + 4 * (seed % 2)] = float("nan")  # replica 1's first or last micro-batch
        with pytest.raises(rp.StageError, match="NaN in the input") as caught:
            pipe.train_step(poisoned, batch[1])
        assert (caught.value.stage, caught.value.chunk) == (1, 3 + 2 * (seed % 2))
        assert caught.value.failure.worker == "worker3"
        assert pipe.train_step(*batch).loss == ours.train_step(*batch)
    assert_all_replicas_are(pipe, ours.model)


def test_an_error_in_one_replica_through_rpc(cluster: rp.Cluster) -> None:
    pipe, ours = make(cluster, failing()), oracle()
    for batch in batches(2):
        poisoned = batch[0].clone()
        poisoned[6] = float("nan")
        with pytest.raises(rp.StageError, match="micro-batch 3 on worker3 raised ArithmeticError: NaN in the input"):
            pipe.train_step(poisoned, batch[1])
        assert pipe.train_step(*batch).loss == ours.train_step(*batch)
    assert_all_replicas_are(pipe, ours.model)
    pipe.close()


class RaisingAdamW(torch.optim.AdamW):
    """Applies its update and then raises, in the third step, on one worker."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=1e-2)
        self.calls = 0

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.calls += 1
        super().step()
        if self.calls == 3 and os.environ.get("RPCPIPE_VICTIM"):
            raise RuntimeError("boom in optimizer")


def be_the_victim() -> None:
    os.environ["RPCPIPE_VICTIM"] = "1"


def be_no_victim() -> None:
    os.environ.pop("RPCPIPE_VICTIM", None)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("victim", ["worker1", "worker2"])
def test_an_optimizer_that_raises_on_one_replica_is_taken_back_on_all(
    cluster: rp.Cluster, victim: str, shard: bool
) -> None:
    pipe, ours = make(cluster, optimizer=RaisingAdamW, shard_optimizer=shard), oracle()
    cluster.call(victim, be_the_victim)
    data = list(batches(5))
    for batch in data[:2]:
        pipe.train_step(*batch)
        ours.train_step(*batch)
    with pytest.raises(rp.StageError, match="boom in optimizer") as caught:
        pipe.train_step(*data[2])
    assert caught.value.failure.worker == victim
    cluster.call(victim, be_no_victim)
    assert_all_replicas_are(pipe, ours.model)
    for batch in data[3:]:
        pipe.train_step(*batch)
        ours.train_step(*batch)
    assert_all_replicas_are(pipe, ours.model)  # Adam's moments and step counts were taken back too
    pipe.close()


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_sharded_or_not_an_optimizer_that_raises_changes_nothing(
    seed: int, shard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order of messages: others' new weights may be in, on their way, or not yet made."""
    apply, victims = LocalOptimizer.apply, list[int]()

    def counted(self: LocalOptimizer, *args: Any) -> None:
        apply(self, *args)
        victims.append(0)
        if len(victims) == 4 * 2 + 1 + seed % 4:
            raise RuntimeError("boom in optimizer")

    monkeypatch.setattr(LocalOptimizer, "apply", counted)
    pipe, ours = make(LocalCluster(4, seed), shard_optimizer=shard), oracle()
    data = list(batches(4))
    for batch in data[:2]:
        pipe.train_step(*batch)
        ours.train_step(*batch)
    with pytest.raises(rp.StageError, match="boom in optimizer"):
        pipe.train_step(*data[2])
    assert_all_replicas_are(pipe, ours.model)
    pipe.train_step(*data[3])
    ours.train_step(*data[3])
    assert_all_replicas_are(pipe, ours.model)


@pytest.mark.parametrize("shard", [False, True])
def test_a_step_is_taken_back_on_all_replicas(cluster: rp.Cluster, shard: bool) -> None:
    pipe, ours = make(cluster, shard_optimizer=shard), oracle()
    first, second = batches(2)
    pipe.train_step(*first)
    ours.train_step(*first)
    with pytest.raises(KeyboardInterrupt), pipe.step() as step:  # noqa: PT012
        step.forward_backward(*second)
        step.optimize()
        raise KeyboardInterrupt
    assert_all_replicas_are(pipe, ours.model)
    assert pipe.train_step(*second).loss == ours.train_step(*second)
    assert_all_replicas_are(pipe, ours.model)
    pipe.close()


def test_lost_gradients_run_into_the_deadline_which_names_them() -> None:
    def drop(to: str, verb: str) -> bool:
        return verb == "deliver" and to == "worker1" and bool(dropping)

    dropping = [True]
    pipe = make(LocalCluster(2, drop=drop, timeout=0.2), chunks=2)
    batch = next(batches(1))
    with pytest.raises(rp.DeadlineExceeded, match=r"worker1 waits for the gradients from worker0 of bucket . of stage"):
        pipe.train_step(*batch)
    dropping.clear()
    ours = oracle(2)
    assert pipe.train_step(*batch).loss == ours.train_step(*batch)
    assert_all_replicas_are(pipe, ours.model)


# --- what else a pipeline does ---


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
        pipe.schedule = name  # type: ignore[assignment]
    with pytest.raises(rp.ScheduleError, match="'pipedream' updates each replica's weights at its own times"):
        pipe.schedule = "pipedream"  # type: ignore[assignment]
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
    with pytest.raises(rp.RpcPipeError, match="lies on one replica only"):
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


def moments(workers: int, shard: bool) -> dict[str, int]:
    """Bytes of optimizer state by worker."""
    cluster = LocalCluster(workers, 1)
    pipe = make(cluster, mlp(9, 64), balance=[4, 5], shard_optimizer=shard)
    pipe.train_step(torch.randn(12, 64), torch.randint(0, 4, (12,)))
    found = {}
    for name, executor in cluster.transport.endpoints.items():
        [actor] = executor.actors.values()
        state = actor._optimizer.optimizer.state
        found[name] = sum(v.numel() * v.element_size() for of in state.values() for v in of.values())
    return found


def test_a_sharded_optimizer_holds_its_part_of_the_state() -> None:
    whole, parts = moments(4, shard=False), moments(4, shard=True)
    for name, size in whole.items():
        assert parts[name] == pytest.approx(size / 2, rel=0.1)
    assert sum(parts.values()) * 2 == sum(whole.values())


def test_more_replicas_than_parameters() -> None:
    """Who owns nothing updates nothing and takes over what others did."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    start = [parameter.clone() for parameter in model.parameters()]
    pipes = [make(LocalCluster(6, 1), model, replicas=3, shard_optimizer=shard) for shard in (False, True)]
    for _ in range(2):
        batch = torch.randn(6, 4), torch.randint(0, 4, (6,))
        losses = {pipe.train_step(*batch).loss for pipe in pipes}
        assert len(losses) == 1
    for replica in range(3):
        assert all(map(torch.equal, states(pipes[0], 0), states(pipes[1], replica)))
    assert not any(map(torch.equal, start, states(pipes[1], 2)))


def test_one_replica_may_be_sharded_too() -> None:
    pipe = make(LocalCluster(2, 1), replicas=1, shard_optimizer=True)
    train_both(pipe, oracle(replicas=1))


# --- refusals and layout ---


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


def test_layout() -> None:
    layout = Layout(tuple("abcdef"), 3)
    assert layout.width == 2
    assert [layout.column(worker) for worker in range(2)] == [tuple("abc"), tuple("def")]
    assert [layout.row(replica) for replica in range(3)] == [tuple("ad"), tuple("be"), tuple("cf")]
    assert layout.index("e") == (1, 1)
    assert layout.replica_of("z") is None
    shares = layout.cut({"x": torch.arange(7), "flag": True}, 2)
    assert [[part["x"].tolist() for part in share] for share in shares] == [[[0, 1], [2]], [[3, 4], [5]], [[6]]]
    assert [len(share) for share in layout.cut(torch.arange(1), 2)] == [1, 0, 0]


# --- buffers ---


def normed() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None)),
        nn.Linear(8, 4),
    )


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("mode", ["micro_batch", "deferred"])
def test_running_statistics_are_the_same_in_all_replicas(mode: str, shard: bool) -> None:
    """Deferred, they are those of the batch; else what the first replica has seen."""
    chunks = 1 if shard else 2
    pipe = make(
        LocalCluster(6, 4), normed(), replicas=3, chunks=chunks, balance=[1, 2], batch_norm=mode, shard_optimizer=shard
    )
    for batch in batches(3, 21):
        poisoned = batch[0].clone(), batch[1] + 9
        with pytest.raises(rp.StageError):
            pipe.train_step(*poisoned)  # what it did to statistics is taken back
        assert pipe.train_step(*batch).applied
        assert all(map(torch.equal, states(pipe, 0), states(pipe, 1)))
        assert all(map(torch.equal, states(pipe, 0), states(pipe, 2)))
    pipe.train_step(*next(batches(1, 4 if chunks == 1 else 12)))  # of 4 the last replica gets nothing
    assert all(map(torch.equal, states(pipe, 0), states(pipe, 2)))


def test_deferred_statistics_are_those_of_one_replica(cluster: rp.Cluster) -> None:
    # SGD: a bias before a BatchNorm has a gradient of rounding errors, which Adam would make as large as any.
    given: dict[str, Any] = {"optimizer": sgd, "balance": [1, 2], "batch_norm": "deferred"}
    two, one = make(cluster, normed(), chunks=2, **given), make(cluster, normed(), chunks=4, replicas=1, **given)
    for batch in batches(3, 16):
        assert two.train_step(*batch).loss == pytest.approx(one.train_step(*batch).loss, rel=1e-6)
    for have, want in zip(states(two, 1), states(one, 0), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    two.close()
    one.close()


# --- last, as the shared workers do not survive it ---


def test_a_dead_worker_is_named_with_its_stage_and_replica(cluster: rp.Cluster) -> None:
    pipe = make(cluster)
    pipe.train_step(*next(batches(1)))
    os.kill(cluster.workers[3].pid, signal.SIGKILL)
    with pytest.raises(rp.WorkerLost, match=r"^stage 1 of replica 1 on worker3") as caught:  # noqa: PT012
        for batch in batches(1000):
            pipe.train_step(*batch)
    assert caught.value.stages == (1,)
    cluster.close()
