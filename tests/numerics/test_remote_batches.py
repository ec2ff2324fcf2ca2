"""Batches that the workers read: the bits of the same batches given from here, and none of them sent from here."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import rpcpipe as rp
from numerics import test_mortal_streams, test_wiring
from rpcpipe.stage import stream_rollback
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd, summed
from support.mortal_cluster import MortalCluster
from support.mortal_hosts import MortalHosts

SAMPLES, SIZE = 43, 8  # the last batch has 3


class Samples(Dataset[Any]):
    """Samples that are augmented with random numbers of all three kinds."""

    read: list[int] = []  # noqa: RUF012  # the numbers of all samples that anybody has read

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.append(index)
        generator = torch.Generator().manual_seed(index)
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return torch.randn(12, generator=generator) * noise, index % 4


def shuffled(epoch: int = 0) -> DataLoader[Any]:
    return DataLoader(Samples(), SIZE, shuffle=True, generator=torch.Generator().manual_seed(epoch))


def of_global_numbers() -> DataLoader[Any]:
    return DataLoader(Samples(), SIZE, shuffle=True)


class Numbered(Dataset[Any]):
    """Batches by number, in an order of the epoch's."""

    def __init__(self, epoch: int = 0) -> None:
        self.samples = Samples()
        self.order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()

    def __len__(self) -> int:
        return -(-SAMPLES // SIZE)

    def __getitem__(self, number: int) -> Any:
        chosen = self.order[number * SIZE : (number + 1) * SIZE]
        return torch.utils.data.default_collate([self.samples[index] for index in chosen])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from batches(6, SIZE)
        yield next(batches(1, 3))


def here(make: Any, seed: int = 0) -> list[Any]:
    """The batches of an iterable, read in this process."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return list(make())


def numbered_here(epoch: int = 0, seed: int = 0) -> list[Any]:
    made, found = Numbered(epoch), []
    for number in range(len(made)):
        torch.manual_seed(seed + number)
        random.seed(seed + number)
        np.random.seed(seed + number)
        found.append(made[number])
    return found


def pipeline(cluster: Any = 2, **options: Any) -> rp.Pipeline:
    given = {"loss": cross_entropy, "optimizer": adamw, "chunks": 4, "clip_grad_norm": 0.5} | options
    model = given.pop("model", None) or mlp()
    return rp.Pipeline(model, LocalCluster(cluster, 3) if isinstance(cluster, int) else cluster, **given)


def figures(results: Any) -> list[Any]:
    return [(result.step, result.loss, result.grad_norm, result.applied) for result in results]


def assert_same_weights(one: rp.Pipeline, other: rp.Pipeline) -> None:
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


CASES: dict[str, dict[str, Any]] = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b on one worker": {"workers": 1},
    "1f1b, batched": {"dispatch": "batched", "workers": 3},
    "interleaved": {"schedule": "interleaved", "virtual_stages": 2},
    "zb-v": {"schedule": "zb-v"},
    "replicas": {"workers": 4, "replicas": 2},
    "sums, accumulated": {"loss": summed, "accumulate": 3},
    "recomputed": {"checkpoint": "always"},
    "pipedream": {"schedule": "pipedream", "chunks": 1},
    "pipedream-2bw": {"schedule": "pipedream-2bw", "weights": "2bw"},
}


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_has_the_bits_of_one_from_here(case: str) -> None:
    """Step by step, and with a step ahead."""
    options = dict(CASES[case])
    workers = options.pop("workers", 2)
    remote, local = pipeline(workers, **options), pipeline(workers, **options)
    for epoch in range(2):
        given = rp.RemoteBatches(partial(shuffled, epoch), seed=epoch)
        expected = figures(local.train(here(partial(shuffled, epoch), epoch), ahead=epoch))
        assert figures(remote.train(given, ahead=epoch)) == expected
        assert len(expected) == 6
        assert remote.evaluate(rp.RemoteBatches(Stream)) == local.evaluate(Stream())
    assert_same_weights(remote, local)


@pytest.mark.parametrize(
    ("make", "expected"),
    [(of_global_numbers, partial(here, of_global_numbers)), (Numbered, numbered_here), (Stream, partial(here, Stream))],
)
def test_all_kinds_of_sources(make: Any, expected: Any) -> None:
    remote, local = pipeline(3), pipeline(3)
    assert figures(remote.train(rp.RemoteBatches(make, seed=7))) == figures(local.train(expected(seed=7)))
    assert_same_weights(remote, local)


def test_one_batch_at_a_time() -> None:
    remote, local, data = pipeline(), pipeline(), here(Stream)
    given = rp.RemoteBatches(Stream)
    for number in (0, 1, 4, 2):  # back, too
        result = remote.train_step(*given.batch(number), metrics={"first": lambda output, target: (output[0, 0], 1)})
        assert result.loss == local.train_step(*data[number]).loss
        assert result.input_grads is None
    with remote.step() as mine, local.step() as other:
        assert mine.forward_backward(*given.batch(5)) == other.forward_backward(*data[5])
        mine.optimize()
        other.optimize()
    inputs = [inputs for inputs, _ in data]
    assert torch.equal(remote(given.batch(6)[0]), local(inputs[6]))
    alone = rp.RemoteBatches(lambda: (inputs for inputs, _ in Stream()))
    assert torch.equal(remote(alone.inputs(3)), local(inputs[3]))
    assert all(map(torch.equal, remote.predict(alone), local.predict(inputs)))
    assert remote.evaluate([given.batch(1), given.batch(3)]) == local.evaluate([data[1], data[3]])


class Doubled:
    """A loss that prepares the targets of a whole batch, and changes what it gets."""

    def prepare(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return targets, torch.full_like(targets, int(targets.sum()))

    def __call__(self, output: torch.Tensor, target: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = cross_entropy(output, target[0]) * (1 + target[1][0] / 100)
        target[1].zero_()
        return loss


def test_named_inputs_go_where_they_are_taken() -> None:
    options: dict[str, Any] = {"balance": [2, 3, 4], "loss": Doubled()}
    remote = pipeline(3, model=test_wiring.layers(), **options)
    local = pipeline(3, model=test_wiring.layers(), **options)
    make = partial(lambda made: made(5), test_wiring.batches)
    assert figures(remote.train(rp.RemoteBatches(make))) == figures(local.train(test_wiring.batches(5)))
    assert_same_weights(remote, local)


def with_cut() -> list[Any]:
    """Batches that say how they are cut: by the caller with weights, by another dimension, not at all."""
    (x, y), _ = batches(2, 6)
    return [
        (rp.MicroBatches([x[:1], x[1:6]], weights=[1.0, 3.0]), rp.MicroBatches([y[:1], y[1:6]])),
        (rp.Batched(x.T.contiguous(), dim=1), y),
        (x.requires_grad_(), y),
    ]


def test_batches_that_say_how_they_are_cut() -> None:
    class Turned(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.shape[-1] == 12 else x.T)

    def model() -> torch.nn.Sequential:
        torch.manual_seed(2)
        return torch.nn.Sequential(Turned(12, 12), torch.nn.ReLU(inplace=True), torch.nn.Linear(12, 4))

    remote, local = pipeline(model=model()), pipeline(model=model())
    assert figures(remote.train(rp.RemoteBatches(with_cut))) == figures(local.train(with_cut()))
    assert_same_weights(remote, local)


@pytest.mark.parametrize("make", [shuffled, Numbered])
def test_training_resumes_in_the_middle_of_an_epoch(make: Any, tmp_path: Path) -> None:
    whole = pipeline()
    expected = figures(whole.train(rp.RemoteBatches(partial(make, 3), seed=4)))
    first = pipeline()
    for number, _ in enumerate(first.train(rp.RemoteBatches(partial(make, 3), seed=4), ahead=1), 1):
        if number == 2:
            first.save(tmp_path, position={"epoch": 3, "batch": number})
            break
    second = pipeline(3, schedule="gpipe")
    position = second.load(tmp_path)
    Samples.read.clear()
    given = rp.RemoteBatches(partial(make, position["epoch"]), start=position["batch"], seed=4)
    assert figures(second.train(given)) == expected[2:]
    assert_same_weights(second, whole)
    left = SAMPLES - 2 * SIZE if make is Numbered else SAMPLES
    assert len(Samples.read) == 2 * left  # by two workers


class Weighed:
    """Counts the messages of a pipeline's driver with tensors, and the largest one's bytes."""

    def __init__(self, pipe: rp.Pipeline) -> None:
        self.tensors, self.largest, self.count = 0, 0, 0
        transport = pipe.cluster.transport
        for name in ("call", "remote", "send"):
            setattr(transport, name, self._weighing(getattr(transport, name)))

    def _weighing(self, send: Any) -> Any:
        def weighing(to: str, verb: str, *args: Any, **options: Any) -> Any:
            if verb not in ("deliver", "deliver_tensors"):  # between workers
                self.count += 1
                self._weigh(args)
            return send(to, verb, *args, **options)

        return weighing

    def _weigh(self, message: Any) -> None:
        weighed = self

        class Finder(pickle.Pickler):
            def persistent_id(self, value: Any) -> Any:
                weighed.tensors += isinstance(value, torch.Tensor)
                return "tensor" if isinstance(value, torch.Tensor) else None

        buffer = io.BytesIO()
        Finder(buffer).dump(message)
        self.largest = max(self.largest, buffer.tell())


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_no_tensor_is_sent_from_here(schedule: str) -> None:
    size = 4096
    data, counts = list(batches(4, size)), {}
    for remote in (False, True):
        pipe = pipeline(schedule=schedule, chunks=2)
        weighed = Weighed(pipe)
        given: Any = rp.RemoteBatches(lambda: batches(4, size)) if remote else data
        losses = [result.loss for result in pipe.train(given)]
        losses.append(pipe.evaluate(rp.RemoteBatches(lambda: batches(4, size)) if remote else data))
        counts[remote] = losses, weighed
    (losses, local), (expected, remote_) = counts[False], counts[True]
    assert losses == expected
    assert local.tensors >= 4 * 2 * 2
    assert remote_.tensors == 0
    assert remote_.largest < 20_000
    # To each of two workers a question for each batch and for the end, and for each of two sources one more.
    assert remote_.count - local.count <= 2 * (5 + 1) * 2


def remote_train(cluster: Any, given: Any, ahead: int, **options: Any) -> tuple[Any, rp.Pipeline]:
    pipe = pipeline(cluster, **options)
    cluster.deadly = True
    found = figures(pipe.train(given, ahead=ahead))
    found.append(pipe.evaluate(rp.RemoteBatches(Stream)))
    cluster.deadly = False
    return found, pipe


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("kind", [MortalCluster, MortalHosts])
@pytest.mark.timeout(120)
def test_workers_die_and_their_successors_read_again(kind: Any, ahead: int) -> None:
    alive, deaths = LocalCluster(2, 1), 0
    expected, alone = remote_train(alive, here(shuffled), ahead)
    for seed in range(2):
        cluster = kind(2, seed, rarity=alive.transport.turns // 4)
        found, pipe = remote_train(cluster, rp.RemoteBatches(shuffled), ahead)
        assert repr(found) == repr(expected)
        assert_same_weights(pipe, alone)
        deaths += cluster.deaths
    assert deaths > 4


@pytest.mark.parametrize("case", ["stash", "latest of two", "2bw"])
@pytest.mark.timeout(120)
def test_workers_die_in_a_stream(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, deaths = test_mortal_streams.Run(LocalCluster(3, 1), case), 0
    expected.train(test_mortal_streams.data(case, 9))
    wanted, rarity = expected.outcome(), expected.cluster.transport.turns // 2
    for seed, every in enumerate((2, 32)):
        monkeypatch.setattr(stream_rollback, "EVERY", every)
        run = test_mortal_streams.Run(MortalCluster(3, seed, rarity=rarity), case)
        given: Any = rp.RemoteBatches(partial(lambda data, case: data(case, 9), test_mortal_streams.data, case))
        run.train(given)
        test_mortal_streams.assert_same(run.outcome(), wanted)
        deaths += run.cluster.deaths
    assert deaths > 1


def test_schedule_and_size_change_within_an_epoch() -> None:
    remote, local = pipeline(4, balance=[4, 4]), pipeline(4, balance=[4, 4])
    found = []
    for pipe, given in ((remote, rp.RemoteBatches(shuffled)), (local, here(shuffled))):
        losses: list[float] = []
        found.append(losses)
        for result in pipe.train(given):
            losses.append(result.loss)
            if len(losses) == 2:
                pipe.schedule = "zb-v"
                pipe.chunks = 2
            elif len(losses) == 4:
                pipe.resize(3)
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert_same_weights(remote, local)


def test_sources_come_and_go() -> None:
    """More of them than workers keep, in turns."""
    remote, local = pipeline(optimizer=sgd), pipeline(optimizer=sgd)
    sources = [rp.RemoteBatches(partial(shuffled, epoch)) for epoch in range(6)]
    data = [here(partial(shuffled, epoch)) for epoch in range(6)]
    for number in range(3):
        for source, expected in zip(sources, data, strict=True):
            assert remote.train_step(*source.batch(number)).loss == local.train_step(*expected[number]).loss


def test_calls_between_two_results() -> None:
    """Each takes the step ahead back, whose batch is read again where it is not held any more."""
    remote, local = pipeline(), pipeline()
    found: list[list[float]] = []
    for pipe, given, other in (
        (remote, rp.RemoteBatches(shuffled), rp.RemoteBatches(Stream)),
        (local, here(shuffled), here(Stream)),
    ):
        seen: list[float] = []
        found.append(seen)
        for number, result in enumerate(pipe.train(given, ahead=1)):
            one = other.batch(number) if isinstance(other, rp.RemoteBatches) else other[number]
            seen += [result.loss, pipe.evaluate(other), pipe.train_step(*one).loss]
    assert found[0] == found[1]
    assert_same_weights(remote, local)
