"""Lanes: tensors through memory that both ends have mapped."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rpcpipe.transport import lane_receiver, lanes
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.transport.lanes import Lanes
from support.faults import wait_for


class Ends:
    """Both ends in this process."""

    def __init__(self) -> None:
        self.generation = uuid.uuid4().hex
        self.here, self.there = Lanes(self.generation), Lanes(self.generation)
        self.received: list[Any] = []
        self.arrived = threading.Condition()
        self.there.serve("there", self._note)
        self._closed = False
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

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


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def lane_bytes() -> int:
    """Return the bytes of lanes' slots that this process has mapped; each end maps them."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "rpcpipe-lane" in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            total += end - start
    return total


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


def test_a_message_that_fails_ends_no_lane(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(f"\0rpcpipe-{ends.generation}-there")
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


def test_waking_is_not_lost_and_time_ends_a_wait() -> None:
    lanes = Lanes(uuid.uuid4().hex)
    lanes.serve("here", lambda verb, args: None)
    assert not lanes.receive(0.0)
    lanes.wake()
    lanes.wake()
    assert lanes.receive(None)
    assert not lanes.receive(0.01)
    lanes.close()
    assert not lanes.receive(None)


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


class Apart:
    """Both ends in this process, which receives where the test says so."""

    def __init__(self) -> None:
        generation = uuid.uuid4().hex
        self.here, self.there = Lanes(generation), Lanes(generation)
        self.received: list[Any] = []
        self.there.serve("there", lambda verb, args: self.received.append(args))

    def receive(self, count: int) -> list[Any]:
        """Receive until ``count`` messages have come."""
        wait_for(lambda: (self.there.receive(0.1), len(self.received) >= count)[1])
        return self.received


@pytest.fixture
def apart() -> Iterator[Apart]:
    apart = Apart()
    yield apart
    apart.here.close()
    apart.there.close()


@contextmanager
def no_descriptor_free() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_lane_that_finds_no_descriptor_waits_and_loses_nothing(
    apart: Apart, caplog: pytest.LogCaptureFixture
) -> None:
    assert apart.here.send("there", "note", (1,))
    with no_descriptor_free():
        for _ in range(3):
            apart.there.receive(0.01)
        assert not apart.received
        assert "ulimit -n" in caplog.text
        assert len(caplog.records) <= 4  # it does not try again and again
    assert apart.receive(1) == [(1,)]
    assert apart.here.send("there", "note", (torch.ones(2),))
    assert apart.receive(2)[1][0].tolist() == [1.0, 1.0]


def test_a_slot_whose_descriptor_is_lost_is_given_up(apart: Apart, caplog: pytest.LogCaptureFixture) -> None:
    assert apart.here.send("there", "note", (0,))
    apart.receive(1)
    before = lane_bytes()
    assert apart.here.send("there", "note", (torch.ones(1 << 18),))
    with no_descriptor_free():
        assert apart.there.receive(5.0)
    assert "no descriptor is free" in caplog.text
    assert len(apart.received) == 1
    for number in range(3):
        assert apart.here.send("there", "note", (torch.full((1 << 18,), float(number)),))
        [received] = apart.receive(2 + number)[-1]
        assert (received == number).all()
    del received
    held = 2 * 3 * ((1 << 20) + lane_receiver.FLAG_BYTES)  # three slots, mapped at both ends, and not what was lost
    assert lane_bytes() - before == held


def test_ctrl_c_ends_a_wait_for_messages_and_loses_none(apart: Apart) -> None:
    assert not apart.there.receive(0.0, interruptible=True)
    interrupt = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt), shield_interrupts():
        apart.there.receive(10.0, interruptible=True)
    interrupt.join()
    assert apart.here.send("there", "note", (1,))
    assert apart.receive(1) == [(1,)]


def test_a_signals_handler_may_receive_or_close_while_the_thread_receives(apart: Apart) -> None:
    def handle(*_: object) -> None:
        if not apart.received:
            assert apart.here.send("there", "note", (1,))
            apart.receive(1)
        else:
            apart.there.close()

    former = signal.signal(signal.SIGUSR1, handle)
    try:
        for outcome in ([(1,)], [(1,)]):
            kill = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
            kill.start()
            with shield_interrupts():
                assert not apart.there.receive(0.3, interruptible=True)
            kill.join()
            assert apart.received == outcome
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert apart.there.address is None
