"""``train(ahead=1)``: whatever is called between results, and whatever goes wrong, it is as with steps in a row."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import rpcpipe as rp
from numerics.test_updates_at_once import marked, model, switching
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd, summed
from support.seeds import some
from support.sent import Sent

OPTIONS: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "gpipe": {"schedule": "gpipe"},
    "interleaved": {"schedule": "interleaved", "virtual_stages": 2},
    "zb-v": {"schedule": "zb-v", "virtual_stages": 2},
    "adamw": {"optimizer": adamw},
    "batched": {"dispatch": "batched", "optimizer": adamw},
    "accumulate": {"accumulate": 2},
    "accumulate-count": {"accumulate": 3, "loss": summed},
    "replicas": {"replicas": 2},
    "sharded": {"replicas": 2, "shard_optimizer": True, "optimizer": adamw},
    "batchnorm": {"batch_norm": "deferred"},
    "recompute": {"checkpoint": "always"},
    "clipped": {"clip_grad_norm": 0.1},
    "float16": {"autocast": torch.float16},
    "sum-count": {"loss": summed},
    "switching": {"loss": switching},
    "stop": {"nonfinite": "stop"},
}
SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=200),
    lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
]


def pipeline(cluster: Any, **changed: Any) -> rp.Pipeline:
    given: dict[str, Any] = {"loss": cross_entropy, "optimizer": sgd, "chunks": 4} | changed
    layers = given.pop("model", None) or model()
    return rp.Pipeline(nn.Sequential(*layers, nn.BatchNorm1d(4)) if "batch_norm" in given else layers, cluster, **given)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items()) and one.keys() == other.keys()


class Calls:
    """What a user may do between two results, chosen by ``seed``; notes what came out."""

    def __init__(self, pipe: rp.Pipeline, scheduler: Any, seed: int, folder: Path) -> None:
        self.pipe, self.scheduler, self.folder = pipe, scheduler, folder
        self.random, self.seen = random.Random(seed), list[Any]()
        self.x, self.y = next(batches(1, 24))

    def some(self) -> None:
        every = [name for name in vars(Calls) if name.startswith("do_")]
        for name in self.random.sample(every, self.random.choice([0, 0, 1, 2])):
            try:
                self.seen.append((name, getattr(self, name)()))
            except (rp.StageError, rp.StateError, rp.ModelError) as error:
                self.seen.append((name, type(error).__name__))

    def do_evaluate(self) -> Any:
        return self.pipe.evaluate([(self.x, self.y)])

    def do_predict(self) -> Any:
        return self.pipe(self.x).sum().item()

    def do_state_dict(self) -> Any:
        return [value.sum().item() for value in self.pipe.state_dict().values()]

    def do_change_weights(self) -> Any:
        def shrink(module: nn.Module) -> float:
            with torch.no_grad():
                return sum(parameter.mul_(0.9).sum().item() for parameter in module.parameters())

        return self.pipe.stages[-1].call(shrink)

    def do_train_on_another_batch(self) -> Any:
        return self.pipe.train_step(self.x, self.y).loss

    def do_train_on_another_batch_that_is_wrong(self) -> Any:
        return self.pipe.train_step(marked(self.x), self.y).applied

    def do_step_by_hand(self) -> Any:
        with self.pipe.step() as step:
            loss = step.forward_backward(self.x, self.y)
            step.optimize()
        return loss

    def do_give_a_step_up(self) -> Any:
        with self.pipe.step() as step:
            step.forward_backward(self.x, self.y)
            raise rp.StateError("given up")

    def do_train_ahead_inside(self) -> Any:
        return [result.loss for result in self.pipe.train([(self.x, self.y)] * 2, ahead=1)]

    def do_set_learning_rate(self) -> Any:
        for group in self.pipe.optimizer.param_groups:
            group["lr"] *= 0.7

    def do_set_clipping(self) -> Any:
        self.pipe.clip_grad_norm = self.random.choice([None, 0.05])

    def do_set_nonfinite(self) -> Any:
        self.pipe.nonfinite = self.random.choice(["skip", "stop"])

    def do_set_accumulate(self) -> Any:
        self.pipe.accumulate = self.random.choice([1, 2])

    def do_set_chunks(self) -> Any:
        self.pipe.chunks = self.random.choice([2, 4, 8])

    def do_drop_accumulated(self) -> Any:
        self.pipe.optimizer.zero_grad()

    def do_change_schedule(self) -> Any:
        virtual = len(self.pipe.stages) > 2
        self.pipe.schedule = self.random.choice(["interleaved", "zb-v"] if virtual else ["1f1b", "gpipe", "zb-h1"])

    def do_go_back(self) -> Any:
        self.pipe.save(self.folder)
        self.pipe.train_step(self.x, self.y)
        self.pipe.load(self.folder)
        return self.pipe.trained

    def do_set_trained(self) -> Any:
        self.pipe.trained += 3

    def do_add_a_hook(self) -> Any:
        self.pipe.optimizer.register_step_pre_hook(lambda *_: None)

    def do_trace(self) -> Any:
        with self.pipe.trace() as timeline:
            self.pipe.train_step(self.x, self.y)
        return len(timeline.spans)


def train(
    options: dict[str, Any],
    seed: int,
    folder: Path,
    *,
    ahead: int,
    raises: bool,
    cluster: Any = None,
    calling: type[Calls] = Calls,
) -> tuple[list[Any], list[Any], dict[str, torch.Tensor]]:
    """Train on batches of which some go wrong; return each step's figures, what calls gave, and the state."""
    choice = random.Random(seed)
    cluster = cluster or LocalCluster(2 * options.get("replicas", 1), seed)
    pipe = pipeline(cluster, **options, model=model(raises=raises))
    scheduler = choice.choice(SCHEDULERS)(pipe.optimizer)
    calls = calling(pipe, scheduler, seed, folder)
    sizes = choice.choices([16, 24], k=9)
    data = [
        (marked(x[-size:]) if choice.random() < 0.2 else x[-size:], y[-size:])
        for (x, y), size in zip(batches(9, 24), sizes, strict=True)
    ]
    figures: list[Any] = []
    done = 0
    while done < len(data):
        try:
            for result in pipe.train(data[done:], ahead=ahead):
                done += 1
                figures.append((result.step, result.loss, result.grad_norm, result.applied, result.lr,
                                result.accumulated, result.loss_scale, pipe.trained))  # fmt: skip
                if not result.accumulated:
                    args = (result.loss,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
                    scheduler.step(*args)
                calls.some()
                if choice.random() < 0.1:
                    break
        except (rp.StageError, rp.ModelError) as error:
            done += 1
            figures.append((type(error).__name__, pipe.trained))
    state = dict(pipe.state_dict())
    pipe.close()
    return figures, calls.seen, state


@pytest.mark.parametrize("raises", [False, True], ids=["nan", "raises"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.timeout(120)
def test_calls_between_results_and_failures_are_as_with_steps_in_a_row(name: str, raises: bool, tmp_path: Path) -> None:
    for seed in some(range(2), 1):
        number = 100 * list(OPTIONS).index(name) + 10 * raises + seed
        print("seed", number)
        (figures, seen, state), (expected, given, after) = (
            train(OPTIONS[name], number, tmp_path / f"{seed}-{ahead}", ahead=ahead, raises=raises) for ahead in (1, 0)
        )
        assert repr(figures) == repr(expected)
        assert repr(seen) == repr(given)
        assert same(state, after)


class Remembering(nn.Module):
    """Its output depends on how many forwards it has had, and on numbers drawn from Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards, self.last = 0, [0.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        self.last.append(random.random())
        return x * (1 + 0.01 * self.forwards + 0.01 * self.last.pop(0))


def test_a_step_that_is_taken_back_leaves_no_trace_in_attributes_and_generators() -> None:
    ends = []
    for ahead in (1, 0):
        pipe = pipeline(LocalCluster(2), model=[*mlp()[:-1], Remembering(), mlp()[-1]])
        random.seed(7)
        losses = []
        for result in pipe.train(batches(5, 24), ahead=ahead):
            losses.append(result.loss)
            losses.append(float(pipe.state_dict()["0.0.weight"].sum()))
        ends.append(losses)
        pipe.close()
    assert ends[0] == ends[1]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += 1
        return x + self.total


@pytest.mark.parametrize("between", [False, True], ids=["reported", "taken back"])
def test_what_could_not_be_taken_back_is_refused(between: bool) -> None:
    cluster: Any = LocalCluster(2)
    pipe, done = pipeline(cluster, model=[*mlp()[:-1], InPlace(), mlp()[-1]]), 0
    with pytest.raises(rp.ModelError, match=r"InPlace.total in place.*register it as a buffer.*ahead=0"):  # noqa: PT012
        for _ in pipe.train(batches(4, 24), ahead=1):
            done += 1
            if between:
                for _ in range(100):  # let the step ahead go on
                    cluster.transport.wait([cluster.transport.call("worker1", "clock")], 1.0)
                pipe.state_dict()
    assert done == pipe.trained == 2
    assert len(list(pipe.train(batches(3, 24)))) == 3


def test_a_step_is_issued_while_the_one_before_runs_and_read_one_batch_ahead() -> None:
    cluster: Any = LocalCluster(2)
    pipe, read, results = pipeline(cluster), 0, 0
    sent = Sent(cluster)

    def reading() -> Iterator[Any]:
        nonlocal read
        for batch in batches(6, 24):
            read += 1
            yield batch

    for result in pipe.train(reading(), ahead=1):
        results += 1
        assert result.step == results - 1
        assert read == min(results + 1, 6)
        assert (pipe.runtime.driver.ahead is None) == (results in (1, 6))  # the first tells what the loss is
    assert results == 6
    assert (sent.operations["BeginStep"], sent.verbs["cancel"]) == (2 * 6, 0)


def test_the_iterators_error_comes_after_the_results_before_it() -> None:
    pipe, losses = pipeline(LocalCluster(2)), []

    def failing() -> Iterator[Any]:
        yield from batches(2, 24)
        raise KeyError("no more data")

    with pytest.raises(KeyError, match="no more data"):
        losses.extend(result.loss for result in pipe.train(failing(), ahead=1))
    assert len(losses) == pipe.trained == 2


@pytest.mark.parametrize("bad", ["targets", "pair", "sizes"])
def test_a_batch_that_cannot_be_cut_is_refused_in_its_turn(bad: str) -> None:
    pipe, losses = pipeline(LocalCluster(2)), []
    (x, y), second = batches(2, 24)
    wrong = {"targets": (x, "what"), "pair": x, "sizes": (x, y[:5])}[bad]
    with pytest.raises(rp.ArgumentError):
        losses.extend(result.loss for result in pipe.train([(x, y), second, wrong, (x, y)], ahead=1))
    assert len(losses) == pipe.trained == 2


def test_the_caller_may_fill_the_same_tensors_again() -> None:
    ends = []
    for ahead in (1, 0):
        pipe, losses = pipeline(LocalCluster(2)), []
        x, y = torch.zeros(24, 12), torch.zeros(24, dtype=torch.long)

        def filling(x: torch.Tensor = x, y: torch.Tensor = y) -> Iterator[Any]:
            for new, target in batches(4, 24):
                x.copy_(new), y.copy_(target)
                yield x, y

        losses = [result.loss for result in pipe.train(filling(), ahead=ahead)]
        ends.append(losses)
    assert ends[0] == ends[1]


def test_gradients_of_inputs_are_those_of_steps_in_a_row() -> None:
    ends = []
    for ahead in (1, 0):
        data = [(x.requires_grad_(), y) for x, y in batches(4, 24)]
        ends.append([result.input_grads for result in pipeline(LocalCluster(2)).train(data, ahead=ahead)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_a_loop_that_is_left_takes_the_step_ahead_back() -> None:
    cluster: Any = LocalCluster(2)
    pipe, twin = pipeline(cluster), pipeline(LocalCluster(2))
    for result in pipe.train(batches(6, 24), ahead=1):
        if result.step == 2:
            break
    for x, y in batches(3, 24):
        twin.train_step(x, y)
    assert same(pipe.state_dict(), twin.state_dict())


def test_a_callback_sees_its_own_step_alone() -> None:
    ends = []
    for ahead in (1, 0):
        pipe, seen = pipeline(LocalCluster(2)), list[float]()
        pipe.on_step(lambda result, pipe=pipe, seen=seen: seen.append(float(pipe.state_dict()["0.forwards"])))
        pipe.on_step(lambda result: 1 / (result.step - 2))
        with pytest.raises(ZeroDivisionError):
            list(pipe.train(batches(5, 24), ahead=ahead))
        ends.append((pipe.trained, seen, [float(value.sum()) for value in pipe.state_dict().values()]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("ahead", [2, -1, None, "1"])
def test_other_numbers_of_steps_are_refused(ahead: Any) -> None:
    with pytest.raises(rp.ArgumentError, match="ahead must be 0 or 1"):
        next(iter(pipeline(LocalCluster(2)).train([], ahead=ahead)))
