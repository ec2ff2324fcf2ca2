"""Named values between layers, near and far: on which ways they travel, and that the bits are one process's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model.microbatch import split
from rpcpipe.model.wiring import DRIVER, ValueRoute, Wiring, live_names, outgoing, required_inputs, value_routes
from rpcpipe.schedules import weight_versions
from rpcpipe.stage.profiler import profile
from support.local_cluster import LocalCluster
from support.models import adamw, cross_entropy, sgd
from support.oracle import Oracle, Versioned, assert_same_weights, train

WIDTH = 12


class Start(nn.Module):
    """Of the inputs' "x": the running value, and a memory that later layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.running, self.memory = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.running(given["x"]), self.memory(given["x"])


class Reads(nn.Module):
    """Mixes what it takes into the running value; gives that too, where asked."""

    def __init__(self, gives: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.linear, self.dropout, self.gives = nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout), gives

    def forward(self, x: torch.Tensor, *taken: torch.Tensor) -> Any:
        for value in taken:
            x = x + value * 0.5
        x = self.dropout(nn.functional.gelu(self.linear(x)))
        return (x, x) if self.gives else x


def layers(dropout: float = 0.1) -> list[Any]:
    """A memory with many readers, an input that three layers take, a name given twice, skips near and far."""
    torch.manual_seed(5)
    return [
        rp.Wired(Start(), gives="memory"),
        rp.Wired(Reads(gives=True, dropout=dropout), takes=("memory", "mask"), gives="skip"),
        rp.Wired(Reads(dropout=dropout), takes="memory"),
        Reads(dropout=dropout),
        rp.Wired(Reads(gives=True, dropout=dropout), takes="skip", gives="skip"),
        rp.Wired(Reads(dropout=dropout), takes=("memory", "mask")),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)),
        rp.Wired(Reads(dropout=dropout), takes=("skip", "memory", "mask", "memory")),
        nn.Linear(WIDTH, 4),
    ]


def batches(count: int, size: int = 10) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        x, mask = torch.randn(size, WIDTH, generator=generator), torch.randn(size, 1, generator=generator)
        yield {"x": x, "mask": mask}, torch.randint(0, 4, (size,), generator=generator)


def train_both(pipe: rp.Pipeline, oracle: Oracle, steps: int = 3, size: int = 10) -> None:
    for given, targets in batches(steps, size):
        result = pipe.train_step(given, targets)
        assert result.loss == oracle.train_step(given, targets)
        assert result.grad_norm == oracle.grad_norm
    assert_same_weights(pipe, oracle.model)


# --- the ways ---


def test_a_value_goes_from_user_to_user_and_through_nobody_else() -> None:
    wirings = [Wiring(gives=("r",)), Wiring(), Wiring(("r",)), Wiring(("r", "m")), Wiring(), Wiring(("r", "m"))]
    assert value_routes(wirings, [1] * 6) == (
        ValueRoute("m", DRIVER, 3), ValueRoute("m", DRIVER, 5),
        ValueRoute("r", 0, 2), ValueRoute("r", 2, 3), ValueRoute("r", 3, 5),
    )  # fmt: skip
    assert value_routes(wirings, [6]) == (ValueRoute("m", DRIVER, 0),)
    assert value_routes(wirings, [2, 2, 2]) == (
        ValueRoute("m", DRIVER, 1),
        ValueRoute("m", DRIVER, 2),
        ValueRoute("r", 0, 1),
        ValueRoute("r", 1, 2),
    )
    assert outgoing(value_routes(wirings, [1] * 6), 0, 5) == {"input": (), "value of stage 2": ("r",)}
    assert outgoing(value_routes(wirings, [1] * 6), 2, 5) == {"input": ("r",)}
    assert outgoing(value_routes(wirings, [1] * 6), 5, 5) == {}


def test_a_name_means_what_was_last_given_under_it() -> None:
    wirings = [Wiring(gives=("r",)), Wiring(("r",)), Wiring(gives=("r",)), Wiring(("r",), ("r",)), Wiring(("r",))]
    assert value_routes(wirings, [1] * 5) == (ValueRoute("r", 0, 1), ValueRoute("r", 2, 3), ValueRoute("r", 3, 4))
    assert required_inputs({str(at): wiring for at, wiring in enumerate(wirings)}) == {}
    assert required_inputs({"a": Wiring(("m", "n"), ("m",)), "b": Wiring(("m", "n"))}) == {"m": "a", "n": "a"}


def test_only_what_is_still_needed_is_kept() -> None:
    wirings = [Wiring(gives=("a", "b")), Wiring(("a",)), Wiring(("b",), ("b",)), Wiring()]
    assert live_names(wirings, ("b",)) == [{"a", "b"}, {"b"}, {"b"}, {"b"}]
    assert live_names(wirings) == [{"a", "b"}, {"b"}, set(), set()]


# --- the bits ---

SCHEDULES = [name for name in rp.schedules.names() if name not in weight_versions.POLICIES]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_bits_as_one_process_under_every_schedule(schedule: str) -> None:
    """Uneven chunks, several workers and placements, all checkpoint modes, both dispatch modes, shuffled messages."""
    modes = itertools.cycle(["never", "always", "except_last", 0.5])
    for seed, workers in enumerate((1, 2, 3, 4)):
        chunks = 2 * workers + seed // 2
        pipe = rp.Pipeline(
            layers(), LocalCluster(workers, seed), loss=cross_entropy, optimizer=sgd, schedule=schedule,
            chunks=chunks, virtual_stages=2 if schedule in ("interleaved", "looped-bfs") else 1,
            dispatch=("rref", "batched")[seed % 2], checkpoint=next(modes),
        )  # fmt: skip
        oracle = Oracle(rp.layers.Sequential(layers()), sgd, cross_entropy, chunks)
        train_both(pipe, oracle, steps=2, size=chunks + chunks // 2)


def test_same_bits_wherever_the_model_is_cut() -> None:
    oracle = Oracle(rp.layers.Sequential(layers()), adamw, cross_entropy, 3)
    losses = [oracle.train_step(*batch) for batch in batches(2)]
    for cuts in list(itertools.combinations(range(1, 9), 3))[::3]:
        balance = [after - before for before, after in itertools.pairwise((0, *cuts, 9))]
        pipe = rp.Pipeline(
            layers(), LocalCluster(4, sum(cuts)), loss=cross_entropy, optimizer=adamw, schedule="zb-h1", chunks=3,
            balance=balance, checkpoint=("never", "always")[sum(cuts) % 2],
        )  # fmt: skip
        assert [pipe.train_step(*batch).loss for batch in batches(2)] == losses
        assert_same_weights(pipe, oracle.model)


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v", "interleaved"])
def test_same_bits_through_rpc(cluster: rp.Cluster, schedule: str, dispatch: str) -> None:
    pipe = rp.Pipeline(
        layers(), cluster, loss=cross_entropy, optimizer=adamw, schedule=schedule, chunks=8, dispatch=dispatch,
        virtual_stages=2 if schedule == "interleaved" else 1,
    )  # fmt: skip
    oracle = Oracle(rp.layers.Sequential(layers()), adamw, cross_entropy, 8)
    train_both(pipe, oracle, size=9)
    given, targets = next(batches(1))
    model = oracle.model.eval()
    with torch.no_grad():
        expected = torch.cat([model(part) for part in split(given, 8)])
    assert torch.equal(pipe(given), expected)
    assert pipe.evaluate([(given, targets)]) == pytest.approx(float(cross_entropy(expected, targets)), rel=1e-6)
    pipe.close()


@pytest.mark.parametrize("kind", ["local", "rpc"])
def test_the_ways_follow_a_live_change_of_schedule(kind: str, request: pytest.FixtureRequest) -> None:
    where: Any = LocalCluster(4, 7) if kind == "local" else request.getfixturevalue("cluster")
    pipe = rp.Pipeline(layers(), where, loss=cross_entropy, optimizer=adamw, chunks=8)
    oracle = Oracle(rp.layers.Sequential(layers()), adamw, cross_entropy, 8)
    for (given, targets), name in zip(batches(4, 16), ["zb-v", "interleaved", "naive", "dualpipe-v"], strict=True):
        assert pipe.train_step(given, targets).loss == oracle.train_step(given, targets)
        pipe.schedule = name
    train_both(pipe, oracle, size=16)
    pipe.close()


@pytest.mark.parametrize(
    ("schedule", "policy"),
    [("pipedream", policy) for policy in ("stash", "vertical_sync")] + [("pipedream-2bw", "2bw")],
)
def test_asynchronous_schedules_carry_them_too(schedule: str, policy: str) -> None:
    balance = [2, 3, 2, 2]
    pipe = rp.Pipeline(
        layers(), LocalCluster(4, 1), loss=cross_entropy, optimizer=sgd, schedule=schedule, chunks=4, balance=balance,
        weights=policy,
    )  # fmt: skip
    oracle = Versioned(rp.layers.Sequential(layers()), sgd, cross_entropy, balance)
    data = list(batches(5, 8))
    losses = [result.loss for result in pipe.train(data)]
    assert losses == pytest.approx(train(oracle, data, policy, 4, 4), rel=1e-6)
    assert_same_weights(pipe, oracle.model)


def test_a_minibatch_that_is_not_finite_is_skipped_on_all_stages() -> None:
    pipe = rp.Pipeline(
        layers(), LocalCluster(4, 1), loss=cross_entropy, optimizer=sgd, schedule="pipedream", chunks=2,
        balance=[2, 3, 2, 2],
    )  # fmt: skip
    given, targets = next(batches(1))
    before = pipe.state_dict()
    results = list(pipe.train([({**given, "x": given["x"] * torch.nan}, targets)] * 2))
    assert [result.skipped for result in results] == [2, 2]
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())


def test_values_and_gradients_go_straight_between_the_stages_that_use_them(cluster: rp.Cluster) -> None:
    def far() -> list[Any]:
        torch.manual_seed(5)
        return [rp.Wired(Start(), gives="memory"), Reads(), Reads(), rp.Wired(Reads(), takes=("memory", "mask"))]

    pipe = rp.Pipeline(far(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2)
    with pipe.trace() as timeline:
        train_both(pipe, Oracle(rp.layers.Sequential(far()), sgd, cross_entropy, 2), 1)
    moved = {(move.producer.kind, move.producer.stage, move.consumer.stage) for move in timeline.transfers}
    assert moved == {
        ("F", 0, 1),
        ("F", 1, 2),
        ("F", 2, 3),
        ("F", 0, 3),
        ("B", 3, 2),
        ("B", 2, 1),
        ("B", 1, 0),
        ("B", 3, 0),
    }
    assert len(timeline.transfers) == 2 * 8
    pipe.close()


# --- other values, other layers ---


class Gives(nn.Module):
    """Several things at once: a nest, None, plain values, and the running value itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        y = self.linear(x)
        return y, y, {"pair": (y * 2, None), "scale": 0.5, "index": torch.arange(len(x))}, None, "word"


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, same: Any, nest: Any, nothing: None, word: str) -> torch.Tensor:
        assert nothing is None
        assert word == "word"
        return self.linear(x + same * nest["scale"] + nest["pair"][0] + nest["index"][:, None])


NAMES = ("same", "nest", "nothing", "word")


def mixed_layers() -> list[Any]:
    torch.manual_seed(2)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    return [
        rp.Wired(Gives(), gives=NAMES), frozen, nn.BatchNorm1d(4), rp.Wired(Takes(), takes=NAMES),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), rp.Wired(Takes(), takes=NAMES),
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_nests_none_plain_values_frozen_layers_and_buffers(cluster: rp.Cluster, schedule: str, checkpoint: str) -> None:
    for balance in ([2, 1, 1, 2], [1, 2, 2, 1], [6]):
        pipe = rp.Pipeline(
            mixed_layers(), cluster, loss=cross_entropy, optimizer=trainable, schedule=schedule, chunks=3,
            balance=balance, checkpoint=checkpoint,
        )  # fmt: skip
        oracle = Oracle(rp.layers.Sequential(mixed_layers()), trainable, cross_entropy, 3)
        for _ in range(2):
            x, y = torch.randn(8, 4), torch.randint(0, 4, (8,))
            assert pipe.train_step(x, y).loss == oracle.train_step(x, y)
        assert_same_weights(pipe, oracle.model)  # running_mean and running_var among them
        pipe.close()


def trainable(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return sgd([parameter for parameter in params if parameter.requires_grad])


def test_specs_are_wired_and_drawn_as_in_one_process(cluster: rp.Cluster) -> None:
    def specs() -> list[Any]:
        return [
            rp.Wired(rp.LayerSpec(Start), gives="memory"),
            rp.LayerSpec(Reads),
            rp.Wired(rp.LayerSpec(Reads, dropout=0.0), takes=["memory", "mask"]),
            rp.LayerSpec(nn.Linear, WIDTH, 4),
        ]

    pipe = rp.Pipeline(specs(), cluster, loss=cross_entropy, optimizer=sgd, chunks=3, seed=4)
    train_both(pipe, Oracle(rp.layers.Sequential(specs(), seed=4), sgd, cross_entropy, 3, seed=4))
    pipe.close()


def test_a_sequential_goes_into_a_pipeline_as_its_list_does() -> None:
    pipe = rp.Pipeline(rp.layers.Sequential(layers()), LocalCluster(3), loss=cross_entropy, optimizer=sgd, chunks=2)
    train_both(pipe, Oracle(rp.layers.Sequential(layers()), sgd, cross_entropy, 2))


# --- cuts ---


def test_profiles_and_measured_cuts_know_wires(cluster: rp.Cluster) -> None:
    given, _ = next(batches(1))
    named = {str(at): layer for at, layer in enumerate(layers())}
    found = profile(named, given)
    row = 10 * WIDTH * 4
    # What passes a cut: the running value, and memory and skip while somebody will take them.
    assert [layer.output_bytes for layer in found] == [
        2 * row,
        2 * row,
        3 * row,
        3 * row,
        2 * row,
        3 * row,
        3 * row,
        row,
        160,
    ]
    assert rp.balance_by_parameters(layers(), 3) == rp.balance_by_parameters(rp.layers.Sequential(layers()), 3)
    pipe = rp.Pipeline(layers(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2, balance="memory", sample=given)
    train_both(pipe, Oracle(rp.layers.Sequential(layers()), sgd, cross_entropy, 2), 1)
    pipe.close()


# --- refusals ---


def test_missing_names_and_wrong_results_are_refused(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(layers(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2)
    given, targets = next(batches(1))
    for wrong in ({"x": given["x"]}, given["x"]):
        calls = (
            partial(pipe.train_step, wrong, targets), partial(pipe, wrong), partial(pipe.evaluate, [(wrong, targets)])
        )  # fmt: skip
        for call in calls:
            with pytest.raises(ValueError, match="layer 1 takes 'mask', which no layer before it gives"):
                call()
    with pytest.raises(rp.StateError, match="stage 1 has layers that take or give named values"):
        pipe.stages[1].forward(given["x"])
    train_both(pipe, Oracle(rp.layers.Sequential(layers()), sgd, cross_entropy, 2))
    pipe.close()
    pipe = rp.Pipeline(
        [rp.Wired(nn.Linear(4, 4), gives="r"), nn.Linear(4, 4)], cluster, loss=cross_entropy, optimizer=sgd,
        balance=[1, 1],
    )  # fmt: skip
    with pytest.raises(rp.ModelError, match=r"a layer that gives 'r' returns \(x, r\), a tuple of 2, not a Tensor"):
        pipe.train_step(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))
    pipe.close()
    with pytest.raises(rp.ArgumentError, match="not a int"):
        rp.Wired(7)  # type: ignore[arg-type]


def test_a_step_that_fails_leaves_no_value_behind(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(layers(), cluster, loss=cross_entropy, optimizer=sgd, chunks=4)
    oracle = Oracle(rp.layers.Sequential(layers()), sgd, cross_entropy, 4)
    given, targets = next(batches(1))
    for bad in ({**given, "mask": torch.randn(10, 7)}, given):
        with pytest.raises(rp.StageError):
            pipe.train_step(bad, targets if bad is not given else targets + 100)
        train_both(pipe, oracle, 1)
    pipe.close()
