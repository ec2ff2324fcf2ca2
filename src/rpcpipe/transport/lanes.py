"""Lanes: messages between processes of one host whose tensors travel through shared memory.

A lane joins two processes in one direction. The sender copies a message's tensors into a slot, a piece of memory that
both have mapped, and sends the rest, pickled, through a socket; the receiver's tensors *are* the slot, which is free
again when the last of them is. Slots are made as they are needed, so a lane never blocks its sender. Their descriptors
pass over the socket, so there is nothing to clean up: memory goes with the last process that has it mapped.

A message that no lane can take (another host, a tensor that is no plain CPU memory, a full socket) goes by RPC;
messages may arrive in any order in any case.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import marshal
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from rpcpipe.transport.lane_receiver import FLAG_BYTES, HEADER, LONGEST_MESSAGE, LOST_SLOT, NO_SLOT, Handle, Receiver
from rpcpipe.transport.roster import Roster
from rpcpipe.transport.slots import (
    TensorPickler,
    address_of,
    copy_dense,
    copy_into,
    dense_layout,
    mapped,
)

_SMALLEST_SLOT = 1 << 16
_SOCKET_BYTES = 1 << 20


class Lanes:
    """The lanes of one process: one per receiver that it sends to, and the end where its own messages come in."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._senders: dict[str, Sender | None] = {}
        self._receiver: Receiver | None = None
        self._lock = threading.Lock()

    def serve(self, handle: Handle) -> None:
        """Let ``handle`` run the messages that other processes of this host send to this one, in ``receive``."""
        receiver = Receiver(handle, self._roster.knows)
        with contextlib.suppress(OSError):  # without, all comes by RPC
            receiver.listen(self._roster.address)
        self._receiver = receiver

    @property
    def listening(self) -> bool:
        """Return whether others can open lanes to this process."""
        return self._receiver is not None and self._receiver.listening

    def receive(self, timeout: float | None, *, interruptible: bool = False) -> bool:
        """Run the messages that have come; wait for some, or for ``wake``, up to ``timeout`` seconds.

        One thread at a time calls this. Returns whether there was anything; False at once if nothing can come.
        """
        return self._receiver is not None and self._receiver.receive(timeout, interruptible=interruptible)

    def wake(self) -> None:
        """Let ``receive`` return."""
        if self._receiver is not None:
            self._receiver.wake()

    def reach(self, to: str) -> bool:
        """Return whether a lane leads to ``to``."""
        return self._sender(to) is not None

    def send(self, to: str, verb: str, args: tuple[Any, ...]) -> bool:
        """Send a message; return False if no lane can take it."""
        sender = self._sender(to)
        return sender is not None and sender.send(verb, args)

    def _sender(self, to: str) -> Sender | None:
        try:
            return self._senders[to]
        except KeyError:
            with self._lock:
                if to not in self._senders:
                    self._senders[to] = _connected(*lane) if (lane := self._roster.lane(to)) else None
                return self._senders[to]

    def lose(self, name: str) -> None:
        """Close the lane to ``name``, which is dead."""
        with self._lock:
            sender, self._senders[name] = self._senders.get(name), None
        if sender is not None:
            sender.close()

    def forget(self, names: Iterable[str]) -> None:
        """Close the lanes to ``names``, where other processes are now or none, and those from whom they had before.

        The next message to a name takes a new lane.
        """
        for name in names:
            self.lose(name)
            self._senders.pop(name, None)
        if self._receiver is not None:
            self._receiver.forget_strangers()

    def close(self) -> None:
        """Close all lanes; tensors that came by them stay valid."""
        if self._receiver is not None:
            self._receiver.close()
        for name in list(self._senders):
            self.lose(name)


def _connected(own: str, address: str) -> Sender | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        connection.bind(own)  # tells who sends
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        connection.connect(address)
    except OSError:  # on another host, or not served
        connection.close()
        return None
    return Sender(connection)


class _OwnSlot(NamedTuple):
    """A slot as its sender has it: ``size`` bytes for tensors, and behind them a byte that says whether it is free."""

    number: int
    memory: memoryview
    address: int
    size: int


class _Message(NamedTuple):
    """What the socket carries, ``dense`` or pickled, and its tensors' place in a slot of ``size`` bytes."""

    data: bytes | memoryview
    dense: bool
    tensors: Sequence[torch.Tensor]
    layout: Any
    size: int

    def copy_into(self, slot: _OwnSlot) -> None:
        if self.dense:
            copy_dense(self.tensors, self.layout, slot.address)
        else:
            copy_into(self.tensors, self.layout, slot.memory, slot.address)


def _dense(verb: str, args: tuple[Any, ...]) -> _Message | None:
    """Return a message of builtins and, last, a list of dense tensors; None for any other."""
    if not args or type(args[-1]) is not list or (laid_out := dense_layout(args[-1])) is None:
        return None
    layout, size = laid_out
    try:
        return _Message(marshal.dumps((verb, args[:-1], layout)), True, args[-1], layout, size)
    except ValueError:  # not all are builtins
        return None


def _pickled(verb: str, args: tuple[Any, ...]) -> _Message | None:
    """Return a message of anything; None if it has tensors that cannot be copied into a slot."""
    buffer = io.BytesIO()
    pickler = TensorPickler(buffer)
    pickler.dump((verb, args))
    return _Message(buffer.getbuffer(), False, pickler.tensors, pickler.shapes, pickler.size) if pickler.plain else None


class Sender:
    """The sending end. Any thread may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._slots: dict[int, _OwnSlot] = {}
        self._numbers = itertools.count()

    def send(self, verb: str, args: tuple[Any, ...]) -> bool:
        """Send a message; return False if it cannot go by a lane, or not now."""
        message = _dense(verb, args) or _pickled(verb, args)
        if message is None or len(message.data) > LONGEST_MESSAGE:
            return False
        with self._lock:
            try:
                self._post(message)
            except (BlockingIOError, OSError):  # full, or closed: the receiver is behind, or dead
                return False
        return True

    def _post(self, message: _Message) -> None:
        """Copy the tensors into a slot and send the message; raises OSError, and the slot is as before."""
        if not message.tensors:
            self._connection.send(HEADER.pack(NO_SLOT, 0, message.dense) + message.data)
            return
        slot = self._best(message.size)
        if slot is None:
            self._post_in_new_slot(message)
            return
        message.copy_into(slot)
        slot.memory[slot.size] = 0
        try:
            self._connection.send(HEADER.pack(slot.number, 0, message.dense) + message.data)
        except OSError:
            slot.memory[slot.size] = 1
            raise

    def _post_in_new_slot(self, message: _Message) -> None:
        self._give_up_lost_slots()
        size = max(_SMALLEST_SLOT, 1 << (message.size - 1).bit_length())
        descriptor = os.memfd_create("rpcpipe-lane", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size + FLAG_BYTES)
            memory = mapped(descriptor, size + FLAG_BYTES)
            slot = _OwnSlot(next(self._numbers), memory, address_of(memory), size)
            message.copy_into(slot)
            header = HEADER.pack(slot.number, size, message.dense)
            socket.send_fds(self._connection, [header, message.data], [descriptor])
            self._slots[slot.number] = slot
        finally:
            os.close(descriptor)

    def _best(self, size: int) -> _OwnSlot | None:
        """Return the smallest free slot that is large enough, and not much too large; None if there is none."""
        best, fits = None, 8 * size + _SMALLEST_SLOT + 1
        for slot in self._slots.values():
            if size <= slot.size < fits and slot.memory[slot.size]:
                best, fits = slot, slot.size
        return best

    def _give_up_lost_slots(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while told := self._connection.recv(LOST_SLOT.size):
                del self._slots[LOST_SLOT.unpack(told)[0]]

    def close(self) -> None:
        """Close the socket; the slots' memory goes when the receiver's tensors do."""
        with self._lock:
            self._connection.close()
