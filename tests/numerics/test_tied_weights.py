"""Weights that layers on different stages share: alike to the bit on every worker, and equal to one process's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model import layers, tied_weights
from rpcpipe.schedules import weight_versions
from rpcpipe.worker.operations import GetState
from support.local_cluster import LocalCluster
from support.models import adamw, cross_entropy, sgd, summed
from support.models import batches as toy_batches
from support.oracle import Oracle, assert_same_weights

WIDTH, VOCABULARY = 6, 9


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(4, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.token(ids) + self.position(torch.arange(ids.shape[1]))


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.GELU())


class Mean(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mean(dim=1)


def specs() -> list[Any]:
    """The embedding's weight is the head's; two blocks share theirs."""
    return [
        rp.LayerSpec(Embed, tied={"token": "token.weight"}),
        rp.LayerSpec(nn.Linear, WIDTH, WIDTH, tied="inner"),
        *(rp.LayerSpec(Block) for _ in range(3)),
        rp.LayerSpec(nn.Linear, WIDTH, WIDTH, bias=False, tied="inner"),
        rp.LayerSpec(Block),
        rp.LayerSpec(Mean, WIDTH, VOCABULARY, bias=False, tied="token"),
    ]


SAME = (("0.token.weight", "7.weight"), ("1.weight", "5.weight"))


def modules() -> list[nn.Module]:
    """The same with modules that share a parameter."""
    return list(rp.layers.Sequential(specs()))


def batches(count: int, size: int = 10) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield (
            torch.randint(0, VOCABULARY, (size, 4), generator=generator),
            torch.randint(0, VOCABULARY, (size,), generator=generator),
        )


def assert_alike(pipe: rp.Pipeline) -> dict[str, torch.Tensor]:
    state = pipe.state_dict()
    for one, other in SAME:
        assert torch.equal(state[one], state[other])
    return state


def assert_near(pipe: rp.Pipeline, model: nn.Module) -> None:
    """Within 1e-6 of each tensor's norm: the sum's order is another one, so the last bits are."""
    state = assert_alike(pipe)
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert (state[name] - value).norm() <= 1e-6 * max(float(value.norm()), 1e-3), name


def train_both(pipe: rp.Pipeline, oracle: Oracle, steps: int = 3, size: int = 10) -> list[float]:
    losses = []
    for ids, targets in batches(steps, size):
        result = pipe.train_step(ids, targets)
        assert result.loss == pytest.approx(oracle.train_step(ids, targets), rel=1e-6)
        assert result.grad_norm == pytest.approx(oracle.grad_norm, rel=1e-6)
        losses.append(result.loss)
    assert_near(pipe, oracle.model)
    return losses


# --- what is tied ---


def test_ties_are_found_by_key_and_by_identity() -> None:
    by_key = layers.find_ties(layers.named_layers(specs()))
    assert [[holder.name for holder in tie.holders] for tie in by_key] == [list(names) for names in SAME]
    by_identity = layers.find_ties(layers.named_layers(modules()))
    assert [tie.holders for tie in by_identity] == [tie.holders for tie in by_key]
    assert layers.find_ties(layers.named_layers([Block(), Block()])) == ()
    assert repr(specs()[7]) == "LayerSpec(Mean, 6, 9, bias=False, tied={'token': 'weight'})"


def test_one_process_shares_the_parameter_as_the_first_layer_draws_it() -> None:
    model = rp.layers.Sequential(specs(), seed=3)
    assert model[7].weight is model[0].token.weight
    untied = rp.layers.Sequential([rp.LayerSpec(Embed)], seed=3)
    assert torch.equal(model[7].weight, untied[0].token.weight)
    assert len(list(model.parameters())) == len(model.state_dict()) - 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ([rp.LayerSpec(nn.Linear, 4, 4, tied="w"), rp.LayerSpec(nn.Linear, 4, 4)], "tied='w' is said of layer 0 alone"),
        (
            [rp.LayerSpec(nn.Linear, 4, 4, tied="w"), rp.LayerSpec(nn.GELU, tied="w")],
            "layer 1, a GELU, has no parameter",
        ),
        (
            [rp.LayerSpec(nn.Linear, 4, 4, tied="w"), rp.LayerSpec(nn.Linear, 4, 3, tied="w")],
            r"0.weight and 1.weight cannot be one weight: \(4, 4\) of torch.float32 and \(3, 4\)",
        ),
    ],
)
def test_what_cannot_be_tied_is_refused(model: list[Any], message: str) -> None:
    with pytest.raises(rp.ModelError, match=message):
        rp.layers.Sequential(model)
    with pytest.raises(rp.ModelError, match=message):
        rp.Pipeline(model, LocalCluster(2), loss=cross_entropy, optimizer=sgd)


def test_a_module_that_comes_again_shares_all_its_parameters() -> None:
    def again() -> nn.Sequential:
        torch.manual_seed(1)
        block = Block()
        return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), block, Block(), block, Mean(WIDTH, VOCABULARY))

    reference = again()
    pipe = rp.Pipeline(again(), LocalCluster(4), loss=cross_entropy, optimizer=sgd, chunks=3)
    oracle = Oracle(rp.layers.Sequential(again()), sgd, cross_entropy, 3)
    assert list(oracle.model.state_dict()) == list(reference.state_dict())
    for ids, targets in batches(2):
        assert pipe.train_step(ids, targets).loss == pytest.approx(oracle.train_step(ids, targets), rel=1e-6)
    state = pipe.state_dict()
    assert torch.equal(state["1.0.weight"], state["3.0.weight"])
    norm = nn.BatchNorm1d(4)
    with pytest.raises(rp.ModelError, match="layer 2 is layer 0 again and has buffers"):
        rp.Pipeline([norm, Block(), norm], LocalCluster(2), loss=cross_entropy, optimizer=sgd)


# --- training ---

SCHEDULES = [name for name in rp.schedules.names() if name not in weight_versions.POLICIES]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equal_to_one_process_and_alike_under_every_schedule(schedule: str) -> None:
    """Shuffled messages twice: the bits are the same, whatever came first."""
    for workers, model in ((2, modules), (3, specs), (4, modules)):
        runs = []
        for seed in (workers, 10 + workers):
            pipe = rp.Pipeline(
                model(), LocalCluster(workers, seed), loss=cross_entropy, optimizer=adamw, schedule=schedule,
                chunks=2 * workers, virtual_stages=2 if schedule in ("interleaved", "looped-bfs") else 1,
                dispatch=("rref", "batched")[seed % 2],
            )  # fmt: skip
            oracle = Oracle(rp.layers.Sequential(specs()), adamw, cross_entropy, 2 * workers)
            runs.append((train_both(pipe, oracle, 2, size=2 * workers + workers), pipe.state_dict()))
        assert runs[0][0] == runs[1][0]
        assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_the_first_layers_weight_used_again_on_its_stage() -> None:
    """A split backward ends at the first layer's output, and must not leave a part of the weight's gradient there."""
    inner = rp.LayerSpec(nn.Linear, WIDTH, WIDTH, tied="inner")
    specs = [inner, rp.LayerSpec(Block), inner, inner, rp.LayerSpec(Block), rp.LayerSpec(nn.Linear, WIDTH, VOCABULARY)]
    runs = []
    for schedule in ("1f1b", "zb-h1"):
        pipe = rp.Pipeline(
            specs, LocalCluster(2), loss=cross_entropy, optimizer=sgd, schedule=schedule, chunks=4, balance=[4, 2]
        )
        losses = [pipe.train_step(x, y).loss for x, y in toy_batches(3, width=WIDTH)]
        runs.append((losses, pipe.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_with_replicas(schedule: str, shard: bool) -> None:
    """All copies on all replicas: one sum over them all."""
    for workers, replicas, model in ((2, 2, specs), (4, 2, modules), (1, 3, specs)):
        pipe = rp.Pipeline(
            model(), LocalCluster(workers * replicas, workers), loss=cross_entropy, optimizer=adamw, chunks=2,
            schedule=schedule, replicas=replicas, shard_optimizer=shard,
        )  # fmt: skip
        train_both(pipe, Oracle(rp.layers.Sequential(specs()), adamw, cross_entropy, 2, replicas=replicas), size=11)
        states = [states_of(pipe, replica) for replica in range(replicas)]
        for state in states[1:]:
            assert all(torch.equal(value, state[name]) for name, value in states[0].items())


def states_of(pipe: rp.Pipeline, replica: int) -> dict[str, torch.Tensor]:
    driver = pipe.runtime.driver
    found = driver.collect({name: driver.call(name, GetState()) for name in pipe.runtime.layout.pipeline_of(replica)})
    return {name: value for stages in found.values() for state in stages.values() for name, value in state.items()}


def test_same_bits_as_one_process_where_the_stage_is_one() -> None:
    oracle = Oracle(rp.layers.Sequential(specs()), sgd, cross_entropy, 3)
    pipe = rp.Pipeline(specs(), LocalCluster(1), loss=cross_entropy, optimizer=sgd, chunks=3)
    assert train_both(pipe, oracle)
    assert_same_weights(pipe, oracle.model)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_through_rpc(cluster: rp.Cluster, schedule: str) -> None:
    """Under zb-v the first and the last stage are one worker's: no message there."""
    pipe = rp.Pipeline(specs(), cluster, loss=summed, optimizer=adamw, schedule=schedule, chunks=8, clip_grad_norm=0.05)
    train_both(pipe, Oracle(rp.layers.Sequential(specs()), adamw, summed, 8, clip=0.05), size=16)
    assert len(pipe.parameter_rrefs()) == len(pipe.state_dict()) - (1 if schedule == "zb-v" else 0)
    pipe.close()


def test_the_sums_go_from_worker_to_worker(cluster: rp.Cluster) -> None:
    """The driver's messages of a step do not grow with the tied weight."""
    sent: list[int] = []
    pipe = rp.Pipeline(specs(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2)
    collect = pipe.runtime.driver.collect

    def counting(replies: Any, *rest: Any) -> Any:
        found = collect(replies, *rest)
        sent.append(sum(isinstance(part, torch.Tensor) for value in found.values() for part in _leaves(value)))
        return found

    pipe.runtime.driver.collect = counting  # type: ignore[method-assign]
    pipe.train_step(*next(batches(1)))
    assert sent
    assert sum(sent) == 0
    pipe.close()


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value, *(_leaves(vars(value)) if hasattr(value, "__dict__") else [])]


@pytest.mark.parametrize(("kind", "replicas", "shard"), [("local", 1, False), ("local", 2, True), ("rpc", 1, False)])
def test_they_stay_alike_through_changes_of_schedule(
    kind: str, replicas: int, shard: bool, request: pytest.FixtureRequest
) -> None:
    """Apart, on one worker, apart again; in the midst of an accumulation too."""
    where: Any = LocalCluster(4 * replicas, 7) if kind == "local" else request.getfixturevalue("cluster")
    pipe, reference = (
        rp.Pipeline(
            specs(), on, loss=cross_entropy, optimizer=adamw, chunks=8, accumulate=2, replicas=replicas,
            shard_optimizer=shard,
        )
        for on in (where, LocalCluster(4 * replicas))
    )  # fmt: skip
    data = list(batches(6, 16 * replicas))
    for batch, name in zip(data, ["zb-v", "gpipe", "interleaved", "zb-v", "1f1b", "dualpipe-v"], strict=True):
        assert pipe.train_step(*batch).loss == pytest.approx(reference.train_step(*batch).loss, rel=1e-6)
        pipe.schedule = name
        assert_alike(pipe)
    for name, value in reference.state_dict().items():
        assert (pipe.state_dict()[name] - value).norm() <= 1e-6 * value.norm()
    pipe.close()


def test_a_failed_step_leaves_nothing_behind(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(specs(), cluster, loss=cross_entropy, optimizer=sgd, chunks=4)
    oracle = Oracle(rp.layers.Sequential(specs()), sgd, cross_entropy, 4)
    ids, targets = next(batches(1))
    for bad in ((ids, targets + 100), (ids + 100, targets)):
        before = assert_alike(pipe)
        with pytest.raises(rp.StageError):
            pipe.train_step(*bad)
        assert all(torch.equal(before[name], value) for name, value in assert_alike(pipe).items())
    train_both(pipe, oracle)
    pipe.close()


def nan_once(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output, target) * (math.nan if int(target[0]) == 0 else 1.0)


def test_nothing_is_applied_anywhere_where_a_gradient_is_not_finite() -> None:
    pipe = rp.Pipeline(specs(), LocalCluster(4), loss=nan_once, optimizer=sgd, chunks=2)
    ids, targets = next(batches(1))
    before = assert_alike(pipe)
    assert not pipe.train_step(ids, torch.zeros_like(targets)).applied
    assert all(torch.equal(before[name], value) for name, value in assert_alike(pipe).items())


def test_frozen_weights_are_tied_and_sent_nowhere() -> None:
    def frozen() -> list[nn.Module]:
        model = rp.layers.Sequential(specs())
        model[0].token.weight.requires_grad_(False)
        return list(model)

    def trainable(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return sgd([parameter for parameter in params if parameter.requires_grad])

    pipe = rp.Pipeline(frozen(), LocalCluster(4), loss=cross_entropy, optimizer=trainable, chunks=2)
    train_both(pipe, Oracle(rp.layers.Sequential(frozen()), trainable, cross_entropy, 2))


# --- state ---


def test_states_have_both_names_and_load_alike(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(specs(), cluster, loss=cross_entropy, optimizer=sgd, chunks=3)
    other = rp.layers.Sequential(specs(), seed=9)
    pipe.load_state_dict(other.state_dict())
    assert_same_weights(pipe, other)
    one = {name: value + 1 for name, value in other.state_dict().items() if name not in ("7.weight", "1.weight")}
    pipe.load_state_dict(one)
    assert torch.equal(assert_alike(pipe)["7.weight"], one["0.token.weight"])
    apart = dict(other.state_dict())
    apart["7.weight"] = apart["7.weight"] + 1
    with pytest.raises(rp.CheckpointError, match=r"0.token.weight and 7.weight are one weight .* differ"):
        pipe.load_state_dict(apart)
    assert torch.equal(assert_alike(pipe)["7.weight"], one["0.token.weight"])
    pipe.close()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"schedule": "zb-v"}),
        ({"schedule": "zb-v"}, {}),
        ({"replicas": 2, "shard_optimizer": True}, {"replicas": 2}),
        ({"replicas": 2}, {"replicas": 2, "shard_optimizer": True, "schedule": "zb-v"}),
    ],
)
def test_a_run_goes_on_from_a_save_wherever_the_copies_lie(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    """Adam's moments of the weight too, which a sharded optimizer has once."""
    first, second = (
        rp.Pipeline(
            specs(), LocalCluster(4 * how.get("replicas", 1)), loss=cross_entropy, optimizer=adamw, chunks=8, **how
        )
        for how in (before, after)
    )
    data = list(batches(3, 32))
    first.train_step(*data[0])
    first.save(tmp_path)
    second.load(tmp_path)
    for batch in data[1:]:
        assert second.train_step(*batch).loss == pytest.approx(first.train_step(*batch).loss, rel=1e-6)
    mine, wanted = assert_alike(second), assert_alike(first)
    assert all((mine[name] - value).norm() <= 1e-6 * value.norm() for name, value in wanted.items())


@pytest.mark.parametrize("schedule", weight_versions.POLICIES)
def test_asynchronous_schedules_refuse_weights_tied_across_stages(schedule: str) -> None:
    with pytest.raises(rp.ScheduleError, match=r"0.token.weight and 7.weight .* stages 0 and 3"):
        rp.Pipeline(specs(), LocalCluster(4), loss=cross_entropy, optimizer=sgd, schedule=schedule)
    pipe = rp.Pipeline(specs(), LocalCluster(4), loss=cross_entropy, optimizer=sgd)
    with pytest.raises(rp.ScheduleError, match="update"):
        pipe.schedule = schedule
    assert pipe.schedule.name == "1f1b"
    near = [rp.LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *specs()[1:7:4], rp.LayerSpec(Mean, WIDTH, VOCABULARY)]
    one_stage = rp.Pipeline(
        near, LocalCluster(2), loss=cross_entropy, optimizer=sgd, schedule=schedule, chunks=2, balance=[1, 3]
    )
    assert one_stage.train_step(*next(batches(1))).applied


def test_cuts_count_the_weight_where_it_lies() -> None:
    counts = layers.parameter_counts(layers.named_layers(specs()))
    assert counts[0] == (VOCABULARY + 4) * WIDTH
    assert counts[7] == VOCABULARY * WIDTH
    assert layers.parameter_counts(layers.named_layers(modules())) == counts
    assert tied_weights.completed((), {}) == {}
