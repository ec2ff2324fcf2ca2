"""Readers that fail, end early or differ, and calls that need tensors here: named, before anything trains."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd

CALLS = itertools.count()  # of a make that differs from call to call
CLUSTERS: list[LocalCluster] = []
SEEN: list[str] = []


@pytest.fixture(autouse=True)
def _no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CALLS", itertools.count())


def pipeline(workers: int = 2, **options: Any) -> rp.Pipeline:
    return rp.Pipeline(
        mlp(4), LocalCluster(workers), **{"loss": cross_entropy, "optimizer": sgd, "chunks": 2, **options}
    )


def failing() -> Iterator[Any]:
    for number, batch in enumerate(batches(5)):
        if number == 3:
            raise KeyError("row 17 is torn")
        yield batch


def shorter_at_each_call() -> list[Any]:
    return list(batches(5))[: 5 - next(CALLS) % 2]


def different_at_each_call() -> list[Any]:
    return list(batches(3))[next(CALLS) % 2 :]


def another_at_the_third_call() -> list[Any]:
    """Two workers call twice."""
    return list(batches(9))[5 * (next(CALLS) // 2) :]


def watched() -> Iterator[Any]:
    SEEN.append(CLUSTERS[0].transport.endpoints["worker0"].progress()[1])
    yield from batches(1)


def after(pipe: rp.Pipeline, losses: list[float], batches_done: int) -> None:
    """What was trained was trained, and the pipeline goes on."""
    losses = losses[:]  # before the callback adds to them
    alone, data = pipeline(), list(batches(5))
    assert losses == [alone.train_step(*batch).loss for batch in data[:batches_done]]
    assert pipe.trained == batches_done
    assert pipe.train_step(*data[4]).loss == alone.train_step(*data[4]).loss


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_reader_that_fails(ahead: int) -> None:
    pipe, losses = pipeline(), list[float]()
    pipe.on_step(lambda result: losses.append(result.loss))
    with pytest.raises(rp.StageError, match=r"reading batch 3 of stage [01] on worker[01] raised KeyError") as caught:
        list(pipe.train(rp.RemoteBatches(failing), ahead=ahead))
    assert isinstance(caught.value, KeyError)
    assert caught.value.stage in (0, 1)
    assert "row 17 is torn" in caught.value.remote_traceback
    assert "Nothing was computed from this batch" in str(caught.value)
    assert "rp.RemoteBatches(make, start=3)" in str(caught.value)
    after(pipe, losses, 3)
    with pytest.raises(rp.StageError, match="reading batch 3"):
        pipe.evaluate(rp.RemoteBatches(failing))


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_reader_that_ends_before_another(ahead: int) -> None:
    pipe, losses = pipeline(), list[float]()
    pipe.on_step(lambda result: losses.append(result.loss))
    with pytest.raises(rp.ArgumentError, match="different batches 4 ") as caught:
        list(pipe.train(rp.RemoteBatches(shorter_at_each_call), ahead=ahead))
    assert "(stage 0)" in str(caught.value)
    assert "(stage 1)" in str(caught.value)
    assert "has no more" in str(caught.value)
    after(pipe, losses, 4)


def test_readers_that_differ() -> None:
    pipe = pipeline()
    with pytest.raises(rp.ArgumentError, match=r"different batches 0 .* checksum .* checksum .* seed what shuffles"):
        list(pipe.train(rp.RemoteBatches(different_at_each_call)))
    after(pipe, [], 0)


def test_a_source_that_is_another_when_a_batch_is_read_again() -> None:
    pipe, losses = pipeline(), list[float]()
    given = rp.RemoteBatches(another_at_the_third_call)
    first = given.batch(0)
    pipe.on_step(lambda result: losses.append(result.loss))
    pipe.train_step(*first)
    for _ in range(4):
        pipe.evaluate(rp.RemoteBatches(lambda: batches(1)))  # workers keep four sources
    with pytest.raises(rp.StateError, match=r"batch 0 .* the same batches whenever it is called"):
        pipe.train_step(*first)
    after(pipe, losses, 1)


def test_in_a_stream_what_was_fed_before_is_trained() -> None:
    pipe, alone = pipeline(schedule="pipedream", chunks=1), pipeline(schedule="pipedream", chunks=1)
    with pytest.raises(rp.StageError, match="reading batch 3"):
        list(pipe.train(rp.RemoteBatches(failing)))
    list(alone.train(list(batches(3))))
    assert pipe.trained == 3
    assert all(map(torch.equal, pipe.state_dict().values(), alone.state_dict().values()))


def test_make_that_raises() -> None:
    def make() -> Any:
        raise FileNotFoundError("no shard")

    with pytest.raises(FileNotFoundError, match="reading batch 0 of stage"):
        list(pipeline().train(rp.RemoteBatches(make)))


def test_make_that_cannot_be_pickled() -> None:
    lock = threading.Lock()
    pipe = pipeline()
    with pytest.raises(rp.ArgumentError, match=r"make of rp.RemoteBatches cannot be pickled .*on the worker"):
        list(pipe.train(rp.RemoteBatches(lambda: [lock])))
    after(pipe, [], 0)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([torch.ones(3, 12)], "rp.RemoteBatches needs of make pairs"),
        ([(torch.ones(3, 12), torch.zeros(2, dtype=torch.long))], "inputs have 3 samples and targets 2"),
        ([(torch.ones(3, 12), None)], "targets must be made of tensors, and are None"),
        ([({"x": torch.ones(0, 12)}, torch.zeros(0))], "inputs: a batch needs tensors"),
        (3, "not iterable"),
    ],
)
def test_what_is_no_batch(made: Any, message: str) -> None:
    pipe = pipeline()
    with pytest.raises(rp.StageError, match=message):
        list(pipe.train(rp.RemoteBatches(lambda: made)))
    after(pipe, [], 0)


def test_a_name_that_inputs_lack() -> None:
    layers = [nn.Linear(12, 12), rp.Wired(nn.Bilinear(12, 1, 4), takes="mask")]
    pipe = rp.Pipeline(layers, LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2)
    with pytest.raises(rp.ArgumentError, match="takes 'mask', which no layer before it gives"):
        list(pipe.train(rp.RemoteBatches(lambda: batches(1))))


def test_calls_that_take_something_else() -> None:
    pipe, given, [(x, y)] = pipeline(), rp.RemoteBatches(lambda: batches(2)), batches(1)
    inputs, targets = given.batch(0)
    calls: dict[str, Any] = {
        "on the workers: pass it to pipe.train": lambda: list(given),
        "the inputs and the targets of one batch": lambda: pipe.train_step(inputs, y),
        "the inputs and the targets of one batch ": lambda: pipe.train_step(x, targets),
        "the inputs and the targets of one batch  ": lambda: pipe.train_step(inputs, given.batch(1)[1]),
        "the inputs and the targets of one batch   ": lambda: pipe.train_step(given.inputs(0), targets),
        "needs tensors, and the batches": lambda: pipe.train_step(given, given),  # type: ignore[arg-type]
        "has no batch 2: it ends": lambda: pipe.train_step(*given.batch(2)),
        "takes the inputs of rp.RemoteBatches": lambda: pipe(targets),
        "needs tensors, and the batches ": lambda: rp.verify(pipe, inputs, targets),
        "a part of them": lambda: pipe.train_step({"x": inputs, "y": x}, y),
        "on the workers: pass it ": lambda: rp.generate(pipe, given, 1),  # type: ignore[arg-type]
        "at least one batch": lambda: pipe.evaluate(rp.RemoteBatches(list)),
    }
    for message, call in calls.items():
        with pytest.raises(rp.RpcPipeError, match=message.rstrip()):
            call()
    assert list(pipe.train(rp.RemoteBatches(list))) == []
    assert list(pipe.train(rp.RemoteBatches(lambda: batches(2), start=2))) == []
    after(pipe, [], 0)


def test_who_waits_is_told_what_the_worker_reads() -> None:
    pipe = pipeline()
    CLUSTERS[:] = [pipe.cluster]  # type: ignore[list-item]
    list(pipe.train(rp.RemoteBatches(watched)))
    assert "runs reading batch 0" in SEEN
