"""Arguments and attributes that no pipeline takes are refused with their value, and change nothing."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd
from support.oracle import Oracle, assert_same_weights

NOT_WHOLE = (2.0, True, "2", None, [2], torch.tensor(2))
NO_COUNT = (*NOT_WHOLE, 0, -1)
NO_LIMIT = (0, -1.0, math.nan, True, "1", torch.tensor(1.0))
WRONG: dict[str, tuple[Any, ...]] = {
    "chunks": NO_COUNT,
    "accumulate": NO_COUNT,
    "replicas": NO_COUNT,
    "virtual_stages": NO_COUNT,
    "flush_every": tuple(value for value in NO_COUNT if value is not None),
    "seed": NOT_WHOLE,
    "clip_grad_norm": NO_LIMIT,
    "nonfinite": ("ignore", True, None, []),
    "batch_norm": ("batch", None),
    "dispatch": ("rpc", None),
    "autocast": (torch.float32, "bfloat16"),
    "checkpoint": ("sometimes", True, -0.1, 1.5, math.nan, None),
    "shard_optimizer": (1, "no", None),
    "schedule": (None, 4, ["1f1b"]),
    "balance": ("layers", 2, None, (), []),
}
WRONG_CUTS = ([2, 3], [0, 4], [-1, 5], [2.0, 2.0], [3, True], [5], [1, 1, 2], ["2", "2"])
SETTABLE = ("chunks", "accumulate", "clip_grad_norm", "nonfinite", "trained", "schedule")


def pipeline(**arguments: Any) -> rp.Pipeline:
    return rp.Pipeline(mlp(4, dropout=0.0), LocalCluster(2), loss=cross_entropy, optimizer=sgd, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_constructor_argument_is_refused_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(rp.errors.ArgumentError, match=f"{name} must be .*not "):
        pipeline(**{name: value})


@pytest.mark.parametrize("balance", WRONG_CUTS)
def test_a_cut_is_refused_with_its_entries(balance: list[Any]) -> None:
    with pytest.raises(rp.PartitionError, match=r"must have \d entries|the cluster has 2; launch more|needs? \d"):
        pipeline(balance=balance)


def test_an_attribute_is_refused_with_its_value_and_keeps_the_one_before() -> None:
    pipe, [batch] = pipeline(chunks=2, clip_grad_norm=1.0), batches(1)
    wrong = {**WRONG, "trained": (*NOT_WHOLE, -1)}
    for name in SETTABLE:
        before = getattr(pipe, name)
        for value in wrong[name]:
            with pytest.raises(rp.errors.ArgumentError, match=f"{name} must be .*not "):
                setattr(pipe, name, value)
        assert getattr(pipe, name) == before
    assert pipe.train_step(*batch).applied


def test_numbers_of_other_types_are_taken_for_what_they_are() -> None:
    import numpy

    pipe = pipeline(
        chunks=numpy.int64(2), clip_grad_norm=numpy.float32(1), seed=-1, balance=numpy.array([1, 3]).tolist()
    )
    assert [type(value) for value in (pipe.chunks, pipe.clip_grad_norm)] == [int, float]
    pipe.clip_grad_norm = math.inf
    assert pipe.train_step(*next(batches(1))).applied


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved", "zb-v", rp.schedules.get("gpipe", 2, 2)])
def test_chunks_may_be_set_between_two_steps(schedule: Any) -> None:
    virtual = 2 if schedule == "interleaved" else 1
    pipe = pipeline(schedule=schedule, chunks=2, virtual_stages=virtual)
    loop = Oracle(mlp(4, dropout=0.0), sgd, cross_entropy, 2)
    name = pipe.schedule.name
    for chunks, (inputs, targets) in zip((2, 5, 1, 3), batches(4), strict=True):
        pipe.chunks = loop.chunks = chunks
        assert (pipe.chunks, pipe.schedule.name) == (chunks, name)
        assert pipe.train_step(inputs, targets).loss == loop.train_step(inputs, targets)
    assert_same_weights(pipe, loop.model)


def test_chunks_of_a_stream_may_be_set() -> None:
    pipe = pipeline(schedule="pipedream", chunks=2)
    for chunks, batch in zip((2, 5), batches(2), strict=True):
        pipe.chunks = chunks
        assert len(pipe.train_step(*batch).versions[0]) == chunks
    pipe = pipeline(schedule="pipedream-2bw", chunks=2)
    with pytest.raises(rp.ScheduleError, match="'pipedream-2bw' needs at least 2 micro-batches on 2 workers, not 1"):
        pipe.chunks = 1
    assert pipe.chunks == 2


@pytest.mark.parametrize("name", ["own", "1f1b"])
def test_chunks_of_a_schedule_of_ones_own_are_its_own(name: str) -> None:
    rows = rp.schedules.get("gpipe", 2, 3).actions
    pipe = pipeline(schedule=rp.Schedule.from_actions(rows, name=name))
    with pytest.raises(rp.ScheduleError, match=r"brings its 3 micro-batches: set pipe.schedule to one of 4"):
        pipe.chunks = 4
    assert pipe.chunks == 3
    pipe.schedule = "1f1b"
    pipe.chunks = 4
    assert pipe.chunks == 4


def test_what_does_not_fit_a_stream_is_refused_when_set() -> None:
    pipe = pipeline(schedule="pipedream", chunks=2)
    with pytest.raises(rp.ScheduleError, match="accumulate=2 does not fit an asynchronous schedule"):
        pipe.accumulate = 2
    assert pipe.accumulate == 1


def test_steps_trained_may_be_set_while_a_stream_is_under_way() -> None:
    pipe = pipeline(schedule="pipedream", chunks=1)
    for result in pipe.train(batches(6)):
        if result.step == 0:
            pipe.trained = 100
    assert pipe.trained > 100


@pytest.mark.parametrize(("index", "value"), list(product(range(3), (2.0, True, "2", 0))))
def test_a_schedule_has_whole_sizes(index: int, value: Any) -> None:
    sizes: list[Any] = [2, 4, 1]
    rp.schedules.get("1f1b", *sizes)
    sizes[index] = value
    with pytest.raises(rp.ArgumentError, match="must be whole numbers and at least 1, not"):
        rp.schedules.get("1f1b", *sizes)


@pytest.mark.parametrize(
    "arguments",
    [{"new_tokens": 2.0}, {"new_tokens": -1}, {"top_k": 0}, {"top_k": True}, {"context": 1.5}, {"seed": None},
     {"temperature": math.nan}, {"temperature": "1"}, {"temperature": -1.0}],
)  # fmt: skip
def test_generation_is_refused_before_it_starts(arguments: dict[str, Any]) -> None:
    [name] = arguments
    with pytest.raises(rp.errors.ArgumentError, match=f"{name} must"):
        rp.generate(pipeline(), torch.zeros(1, 2, dtype=torch.long), **{"new_tokens": 1, **arguments})


class Spoken(list[Any]):
    """Counts how often it is put into words."""

    times = 0

    def __repr__(self) -> str:
        Spoken.times += 1
        return "…"


def test_what_is_taken_is_not_put_into_words() -> None:
    """That of many batches, or of a large model's state, takes seconds."""
    pipe = rp.Pipeline(mlp(4), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2)
    data = Spoken(batches(2))
    assert len(list(pipe.train(data))) == 2
    assert pipe.evaluate(data) > 0
    assert len(list(pipe.predict(Spoken(inputs for inputs, _ in data)))) == 2
    assert Spoken.times == 0
