"""Lanes: tensors through memory that both ends have mapped."""

from __future__ import annotations

import gc
import socket
import threading
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from rpcpipe.transport import lanes
from rpcpipe.transport.lanes import Lanes
from rpcpipe.transport.roster import Roster, Seat
from support.faults import wait_for
from support.memory import lane_bytes, open_files


class Ends:
    """Both ends in this process."""

    def __init__(self) -> None:
        self.generation = uuid.uuid4().hex
        self.here, self.there = Lanes(self.roster("here")), Lanes(self.roster("there"))
        self.received: list[Any] = []
        self.arrived = threading.Condition()
        self.there.serve(self._note)
        self._closed = False
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def roster(self, name: str) -> Roster:
        return Roster(self.generation, name, {"here": Seat("here-1", 1), "there": Seat("there-2", 2)})

    def _receive(self) -> None:
        while not self._closed:
            self.there.receive(None)

    def close(self) -> None:
        self.here.close()
        self.close_there()

    def close_there(self) -> None:
        self._closed = True
        self.there.wake()
        self._thread.join()
        self.there.close()

    def _note(self, verb: str, args: tuple[Any, ...]) -> None:
        with self.arrived:
            self.received.append((verb, args))
            self.arrived.notify()

    def pass_on(self, *args: Any) -> Any:
        """Send a message and return what arrives."""
        assert self.here.send("there", "note", args)
        return self.take()

    def take(self) -> Any:
        with self.arrived:
            assert self.arrived.wait_for(lambda: self.received, timeout=10)
            verb, args = self.received.pop(0)
        assert verb == "note"
        return args


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


TENSORS = {
    "float": torch.randn(3, 5),
    "half": torch.randn(7).half(),
    "bfloat16": torch.randn(7).bfloat16(),
    "bool": torch.tensor([True, False, True]),
    "long": torch.arange(9).view(3, 3),
    "complex": torch.randn(4, dtype=torch.complex64),
    "scalar": torch.tensor(2.5),
    "transposed": torch.randn(4, 6).t(),
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "strided": torch.randn(8, 8)[::2, ::3],
    "expanded": torch.randn(1, 4).expand(5, 4),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_values_and_memory_formats_arrive(ends: Ends, kind: str) -> None:
    tensor = TENSORS[kind]
    nest, number, other = ends.pass_on({"x": [tensor, None]}, 3, tensor)
    for received in (nest["x"][0], other):
        assert torch.equal(received, tensor)
        assert received.dtype == tensor.dtype
        assert received.stride() == torch.empty_like(tensor).stride()
        assert received.data_ptr() % 64 == 0
        assert received.data_ptr() != tensor.data_ptr()
    assert number == 3


def test_what_was_sent_may_change_afterwards(ends: Ends) -> None:
    tensor = torch.ones(1000)
    assert ends.here.send("there", "note", (tensor,))
    tensor.zero_()
    assert ends.take()[0].sum() == 1000


def test_a_slot_is_used_again_when_its_last_tensor_has_gone_and_not_before(ends: Ends) -> None:
    [first] = ends.pass_on(torch.full((70_000,), 1.0))
    view = first.view(2, 35_000)[1]
    addresses = {first.data_ptr()}
    del first
    for number in range(2, 12):
        [received] = ends.pass_on(torch.full((70_000,), float(number)))
        addresses.add(received.data_ptr())
        assert (view == 1.0).all()
        del received
        gc.collect()
    assert len(addresses) == 2
    grown = lane_bytes()
    del view
    for number in range(10):
        ends.pass_on(torch.full((70_000,), float(number)))
    assert lane_bytes() == grown


def test_it_grows_with_what_is_in_flight_and_keeps_no_descriptor(ends: Ends) -> None:
    ends.pass_on(torch.ones(100_000))
    files = open_files()
    held = [ends.pass_on(torch.full((100_000,), float(number)))[0] for number in range(40)]
    assert open_files() == files
    assert all((tensor == number).all() for number, tensor in enumerate(held))


def test_threads_may_send_at_once(ends: Ends) -> None:
    def send(number: int) -> None:
        for _ in range(50):
            while not ends.here.send("there", "note", (number, torch.full((2_000,), float(number)))):
                pass  # full: by RPC otherwise

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    counts = [0] * 4
    for _ in range(200):
        number, tensor = ends.take()
        assert (tensor == number).all()
        counts[number] += 1
    for thread in threads:
        thread.join()
    assert counts == [50] * 4


@pytest.mark.parametrize(
    "value",
    [torch.empty(0, 4), torch.eye(3).to_sparse(), torch.randn(3, dtype=torch.cfloat).conj(),
     torch.randn(3, requires_grad=True), torch.empty(3, device="meta"), "x" * 100_000],
    ids=["no elements", "sparse", "conjugated view", "with a gradient", "meta", "long"],
)  # fmt: skip
def test_other_values_are_left_to_rpc(ends: Ends, value: Any) -> None:
    assert not ends.here.send("there", "note", (value,))
    assert ends.pass_on(1) == (1,)


def test_nobody_there_and_the_dead_take_nothing(ends: Ends) -> None:
    assert not ends.here.send("elsewhere", "note", (1,))
    [tensor] = ends.pass_on(torch.ones(10))
    ends.close_there()
    wait_for(lambda: not ends.here.send("there", "note", (1,)))
    assert tensor.sum() == 10
    assert not ends.here.send("there", "note", (torch.ones(10),))
    ends.here.lose("there")
    assert not ends.here.send("there", "note", (1,))


def test_a_name_forgotten_is_reached_again(ends: Ends) -> None:
    assert ends.pass_on(1) == (1,)
    ends.here.lose("there")
    assert not ends.here.reach("there")
    ends.here.forget(["there"])
    assert ends.pass_on(2) == (2,)


def test_a_message_that_fails_ends_no_lane(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own, there = ends.roster("here").lane("there") or ("", "")
    connection.bind(f"{own}, another one")
    connection.connect(there)
    connection.send(b"no message of ours at all")
    assert ends.pass_on(torch.ones(2))[0].sum() == 2
    wait_for(lambda: "a message by a lane failed" in caplog.text)
    connection.close()
    assert ends.pass_on(7) == (7,)


def test_closing_leaves_no_memory_descriptor_or_thread() -> None:
    before = left()
    ends = Ends()
    held = [ends.pass_on(torch.ones(100_000)) for _ in range(3)]
    assert lane_bytes() > before[2]
    ends.close()
    del held, ends
    gc.collect()
    wait_for(lambda: all(now <= then for now, then in zip(left(), before, strict=True)))


def left() -> tuple[int, int, int]:
    return open_files(), threading.active_count(), lane_bytes()


DENSE = [
    torch.arange(6.0).view(2, 3), torch.tensor(3.5, dtype=torch.float64), torch.ones(7, dtype=torch.bfloat16),
    torch.tensor([True, False]), torch.arange(5), torch.zeros(1, 1, 1, dtype=torch.uint8),
]  # fmt: skip


def test_dense_tensors_and_builtins_need_no_pickler(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_pickled", None)
    for tensors in (DENSE, DENSE[:1], []):
        *args, received = ends.pass_on("pipeline", 7, (("F", 1, 3), "input"), [True], None, tensors)
        assert args == ["pipeline", 7, (("F", 1, 3), "input"), [True], None]
        for one, sent in zip(received, tensors, strict=True):
            assert torch.equal(one, sent)
            assert (one.dtype, one.shape, one.stride()) == (sent.dtype, sent.shape, sent.stride())
            assert one.data_ptr() % 64 == 0


class Named(NamedTuple):
    x: int


@pytest.mark.parametrize(
    ("arg", "tensors"),
    [
        (Named(3), [torch.ones(2)]),
        (1, [torch.arange(6.0).view(2, 3).t()]),
        (1, [torch.ones(3, 1, 7).transpose(0, 1)]),
        (1, [torch.ones(2, 1, 4, 4).to(memory_format=torch.channels_last)]),
        (1, [torch.ones(2, dtype=torch.complex64)]),
        (1, [torch.nn.Parameter(torch.ones(2), requires_grad=False)]),
        (1, [torch.ones(2), 3]),
        (1, {"x": torch.ones(2)}),
    ],
    ids=["namedtuple", "transposed", "size-1", "channels-last", "complex", "parameter", "no-tensor", "dict"],
)
def test_what_is_not_dense_or_no_builtin_is_pickled(ends: Ends, arg: Any, tensors: Any) -> None:
    received_arg, received = ends.pass_on(arg, tensors)
    assert type(received_arg) is type(arg)
    assert received_arg == arg
    assert type(received) is type(tensors)
    for one, sent in zip(
        torch.utils._pytree.tree_leaves(received), torch.utils._pytree.tree_leaves(tensors), strict=True
    ):
        if isinstance(sent, torch.Tensor):
            assert torch.equal(one, sent)
            assert (one.dtype, one.stride()) == (sent.dtype, sent.stride())
        else:
            assert one == sent


def test_a_slot_of_dense_tensors_is_used_again_once_the_last_is_gone(ends: Ends) -> None:
    sent = [torch.full((1000,), 1.0), torch.full((10,), 2.0)]
    _, received = ends.pass_on("a", sent)
    address, last = received[0].data_ptr(), received[1]
    del received
    _, other = ends.pass_on("b", sent)
    assert other[0].data_ptr() != address
    assert last.tolist() == [2.0] * 10
    del last, other
    gc.collect()
    addresses = set()
    for number in range(4):
        _, again = ends.pass_on("c", [torch.full((1000,), float(number)), sent[1]])
        assert again[0][-1] == number
        addresses.add(again[0].data_ptr())
        del again
    assert address in addresses
