"""A worker's reader by itself: what it holds, what it reads again, and whose random numbers it draws."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rpcpipe.errors import ArgumentError, StateError
from rpcpipe.model.wiring import Wiring
from rpcpipe.transport.user_pickling import dumps
from rpcpipe.worker.actor_spec import ActorSpec
from rpcpipe.worker.messages import BatchRef, ReadAnswer, ReadOrder, ReadPart, Source
from rpcpipe.worker.reader import Reader, digest
from rpcpipe.worker.stage_set import StageSet
from support.models import batches, cross_entropy

READ: list[int] = []  # the numbers of the batches that have been made


def counted() -> Iterator[Any]:
    for number, batch in enumerate(batches(6, 4)):
        READ.append(number)
        yield batch


def fails_once() -> Iterator[Any]:
    for batch in counted():
        if READ == [0, 1]:
            raise OSError("the disk is away")
        yield batch


class Numbered:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> Any:
        READ.append(number)
        return list(batches(6, 4))[number]


class Unsized:
    """Has numbers, and no length: it is iterated over, as Python does it."""

    def __getitem__(self, number: int) -> Any:
        return Numbered()[number]


def drawn() -> Iterator[Any]:
    """Random numbers of all three kinds."""
    for _ in range(3):
        yield torch.rand(2) + random.random() + float(np.random.rand()), torch.zeros(2)


@pytest.fixture
def reader() -> Reader:
    READ.clear()
    spec = ActorSpec(
        stages={0: (OrderedDict(a=nn.Linear(12, 4)), 0)},
        last_stage=0,
        loss=cross_entropy,
        optimizer=None,
        seed=0,
        wirings={"a": Wiring()},
    )
    return Reader(StageSet(spec, torch.device("cpu")))


def order(number: int, make: Callable[[], Any] | None = counted, *, key: int = 0, keep: int = 2) -> ReadOrder:
    source = None if make is None else Source(dumps(make), 5)
    return ReadOrder(BatchRef(key, number, True, 1, 2), 0, True, source, (0, 1), keep)


def part(number: int, slot: str = "input", batch: Any = None) -> ReadPart:
    return ReadPart(order(number).ref, digest(batch or list(batches(9, 4))[number]), 1, slot)


def test_a_source_that_it_does_not_know_is_asked_for(reader: Reader) -> None:
    assert not reader.read(order(0, None)).known
    assert reader.read(order(0)).info is not None
    assert reader.read(order(1, None)).info is not None
    assert reader.read(order(6, None)) == ReadAnswer(None)
    assert READ == [0, 1, 2, 3, 4, 5]


def test_a_source_that_is_not_named_any_more_is_dropped(reader: Reader) -> None:
    reader.read(order(0))
    reader.read(order(0, key=1)._replace(sources=(1,)))
    assert not reader.read(order(0, None)).known


def test_what_may_be_under_way_is_read_once(reader: Reader) -> None:
    for number in range(4):
        reader.read(order(number))
        for earlier in range(max(0, number - 1), number + 1):
            filled = reader.filled({"input": part(earlier), "target": part(earlier, "target"), "other": 3})
            x, y = list(batches(6, 4))[earlier]
            assert torch.equal(filled["input"].nest[0], x[2:])
            assert torch.equal(filled["target"], y[2:])
            assert filled["other"] == 3
            filled["input"].nest[0].zero_()  # a copy
            filled["target"].zero_()
    assert READ == [0, 1, 2, 3]


@pytest.mark.parametrize(("make", "read"), [(counted, [0, 1, 2, 3, 0, 1, 2]), (Numbered, [0, 3, 1, 2])])
def test_what_is_not_held_is_read_again(reader: Reader, make: Any, read: list[int]) -> None:
    for number in (0, 3):
        reader.read(order(number, make, keep=1))
    for number in (1, 2):
        filled = reader.filled({"input": part(number)})
        assert torch.equal(filled["input"].nest[0], list(batches(6, 4))[number][0][2:])
    assert read == READ


def test_the_end_of_a_source_with_numbers(reader: Reader) -> None:
    assert reader.read(order(6, Numbered)).info is None
    assert READ == []
    assert reader.read(order(6, Unsized, key=1)).info is None
    assert READ == [0, 1, 2, 3, 4, 5, 6]


def test_a_batch_that_is_another_when_it_is_read_again_is_refused(reader: Reader) -> None:
    reader.read(order(0, keep=1))
    reader.read(order(1, keep=1))
    other = next(batches(1, 4))[0], torch.zeros(4)
    for wrong in (part(8), part(0, batch=other), part(1, batch=other)):  # not there, read again, held
        with pytest.raises(StateError, match=r"batch \d .* the same batches whenever it is called"):
            reader.filled({"input": wrong})


def test_random_numbers_are_its_own(reader: Reader) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = list(drawn())
    for number in (0, 1, 2):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        ones = torch.rand(1), random.random(), np.random.rand()
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        reader.read(order(number, drawn))
        assert ones == (torch.rand(1), random.random(), np.random.rand())
        filled = reader.filled({"input": part(number, batch=expected[number])})
        assert torch.equal(filled["input"].nest[0], expected[number][0][1:])


def test_after_an_error_it_begins_anew(reader: Reader) -> None:
    reader.read(order(0, fails_once))
    with pytest.raises(OSError, match="away"):
        reader.read(order(1))
    assert reader.read(order(1)).info is not None
    assert READ == [0, 1, 0, 1]


def test_inputs_and_targets_of_different_sizes_are_refused(reader: Reader) -> None:
    with pytest.raises(ArgumentError, match="inputs have 4 samples and targets 3"):
        reader.read(order(0, lambda: [(torch.ones(4, 12), torch.ones(3))]))


def test_digests_tell_batches_apart() -> None:
    x, y = next(batches(1))
    others = [
        (x, y), ({"a": x}, y), (x.flip(0), y), (x.flip(1), y), (x, y.to(torch.int32)), (x.T, y), (x.double(), y),
        (x[:9], y), (x + 1e-7, y), (y, x),
    ]  # fmt: skip
    found = [digest(other) for other in others]
    assert found[0] == found[1] == digest((x.clone(), y.clone()))
    assert len(set(found)) == len(found) - 1
    digest((x.to_sparse(), torch.empty(0), torch.ones(3, dtype=torch.bfloat16), x.T, torch.ones(2) + 1j))
