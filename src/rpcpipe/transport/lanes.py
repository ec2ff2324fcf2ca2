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
import logging
import marshal
import os
import pickle
import selectors
import socket
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from rpcpipe.transport.roster import Roster, sender_of
from rpcpipe.transport.slots import (
    TensorPickler,
    address_of,
    copy_dense,
    copy_into,
    dense_layout,
    dense_tensors,
    mapped,
    unpickled,
)

_SMALLEST_SLOT = 1 << 16
_LONGEST_MESSAGE = 1 << 16  # beside tensors; longer ones go by RPC
# The slot's number (_NO_SLOT: none), the size of a slot that is new (else 0), and whether the rest is not pickled.
_HEADER = struct.Struct("<IQ?")
_NUMBER = struct.Struct("<I")
_DESCRIPTOR = struct.Struct("i")
_ANCILLARY = socket.CMSG_SPACE(_DESCRIPTOR.size)
_NO_SLOT = (1 << 32) - 1
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_SOCKET_BYTES = 1 << 20

log = logging.getLogger("rpcpipe")

# Runs a verb with its arguments.
Handle = Callable[[str, tuple[Any, ...]], object]


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

    def receive(self, timeout: float | None) -> bool:
        """Run the messages that have come; wait for some, or for ``wake``, up to ``timeout`` seconds.

        One thread calls this. Returns whether there was anything.
        """
        assert self._receiver is not None, "serve comes first"
        return self._receiver.receive(timeout)

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

    def forget(self, name: str) -> None:
        """Close the lane to ``name``, where another process is now: the next message takes a new one."""
        self.lose(name)
        self._senders.pop(name, None)

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
    number: int
    memory: memoryview
    address: int


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
        self._slots: list[_OwnSlot] = []
        self._free: list[int] = []

    def send(self, verb: str, args: tuple[Any, ...]) -> bool:
        """Send a message; return False if it cannot go by a lane, or not now."""
        message = _dense(verb, args) or _pickled(verb, args)
        if message is None or len(message.data) > _LONGEST_MESSAGE:
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
            self._connection.send(_HEADER.pack(_NO_SLOT, 0, message.dense) + message.data)
            return
        number = self._take(message.size)
        if number is None:
            self._post_in_new_slot(message)
            return
        message.copy_into(self._slots[number])
        try:
            self._connection.send(_HEADER.pack(number, 0, message.dense) + message.data)
        except OSError:
            self._free.append(number)
            raise

    def _post_in_new_slot(self, message: _Message) -> None:
        size = max(_SMALLEST_SLOT, 1 << (message.size - 1).bit_length())
        descriptor = os.memfd_create("rpcpipe-lane", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            memory = mapped(descriptor, size)
            slot = _OwnSlot(len(self._slots), memory, address_of(memory))
            message.copy_into(slot)
            header = _HEADER.pack(slot.number, size, message.dense)
            socket.send_fds(self._connection, [header, message.data], [descriptor])
            self._slots.append(slot)
        finally:
            os.close(descriptor)

    def _take(self, size: int) -> int | None:
        """Return the smallest free slot that is large enough, and not much too large; None if there is none."""
        best = self._best(size)
        if best is None:
            with contextlib.suppress(BlockingIOError):
                while number := self._connection.recv(_NUMBER.size):
                    self._free.append(*_NUMBER.unpack(number))
            best = self._best(size)
        if best is not None:
            self._free.remove(best)
        return best

    def _best(self, size: int) -> int | None:
        best, fits = None, 8 * size + _SMALLEST_SLOT + 1
        for number in self._free:
            if size <= (length := len(self._slots[number].memory)) < fits:
                best, fits = number, length
        return best

    def close(self) -> None:
        """Close the socket; the slots' memory goes when the receiver's tensors do."""
        with self._lock:
            self._connection.close()


class Receiver:
    """The receiving end of all lanes to this process. One thread receives: it runs each message's verb itself."""

    def __init__(self, handle: Handle, knows: Callable[[str], bool]) -> None:
        self._handle, self._knows = handle, knows  # the latter tells of a wire name whether it is one of the group
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._waker, selectors.EVENT_READ, self._woken)
        # Not in close: who wakes a closed receiver must not write to a descriptor that is somebody else's by now.
        weakref.finalize(self, os.close, self._waker).atexit = False
        self._lock = threading.Lock()  # held while a thread receives
        self._closed = False

    def listen(self, address: str) -> None:
        """Take connections at ``address``; raises OSError if that cannot be."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def receive(self, timeout: float | None) -> bool:
        """Wait up to ``timeout`` seconds, None for ever, for messages or ``wake``, and run them.

        Returns whether there was anything.
        """
        with self._lock:
            if self._closed:
                return False
            ready = self._selector.select(timeout)
            for key, _ in ready:
                key.data()
        return bool(ready)

    def wake(self) -> None:
        """Let the thread that receives, now or next, return."""
        os.eventfd_write(self._waker, 1)

    def close(self) -> None:
        """Receive no more."""
        if self._closed:
            return
        self._closed = True
        self.wake()
        with self._lock:  # whoever receives lets go of it: it is awake, and no verb blocks
            for registered in list(self._selector.get_map().values()):
                if isinstance(registered.fileobj, socket.socket):
                    registered.fileobj.close()
            self._selector.close()

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._waker)

    def _accept(self) -> None:
        assert self._listener is not None
        connection, address = self._listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.getuid():
            connection.close()
            return
        connection.setblocking(False)
        incoming = _Incoming(connection, sender_of(address), self._handle)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(incoming))

    def _read(self, incoming: _Incoming) -> None:
        if not (self._knows(incoming.sender) and incoming.read()):  # nothing is read of the dead that are replaced
            self._selector.unregister(incoming.connection)
            incoming.connection.close()


class _Incoming:
    """One lane's receiving end."""

    def __init__(self, connection: socket.socket, sender: str, handle: Handle) -> None:
        self.connection = connection
        self.sender = sender  # its wire name
        self._handle = handle
        self._slots: dict[int, memoryview] = {}
        # Kept until they are called: a reference that is gone calls nothing.
        self._references: dict[int, weakref.ref[memoryview]] = {}
        self._freed: deque[int] = deque()
        self._buffer = bytearray(_HEADER.size + _LONGEST_MESSAGE)
        self._view = memoryview(self._buffer)

    def read(self) -> bool:
        """Run the next message; return False once the sender has ended.

        One at a time: who receives looks whether it is what they wait for before the next is read.
        """
        try:
            length, ancillary, _, _ = self.connection.recvmsg_into([self._buffer], _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not length:
            return False
        try:
            self._run(self._view[:length], ancillary)
        except Exception:
            log.exception("a message by a lane failed")
        return True

    def _run(self, data: memoryview, ancillary: Sequence[tuple[int, int, bytes]]) -> None:
        number, size, dense = _HEADER.unpack_from(data)
        for _, _, passed in ancillary:
            (descriptor,) = _DESCRIPTOR.unpack(passed)
            try:
                self._slots[number] = mapped(descriptor, size)
            finally:
                os.close(descriptor)
        verb, args = self._read(data[_HEADER.size :], number, dense)
        self._handle(verb, args)

    def _read(self, data: memoryview, number: int, dense: bool) -> Any:
        if number == _NO_SLOT:
            if not dense:
                return pickle.loads(data)
            verb, args, _ = marshal.loads(data)
            return verb, (*args, [])
        # All tensors of the message refer to this view; when the last has gone, it goes.
        memory = memoryview(self._slots[number])
        self._references[number] = weakref.ref(memory, lambda _: self._free(number))
        if not dense:
            return unpickled(data, memory)
        verb, args, layout = marshal.loads(data)
        return verb, (*args, dense_tensors(layout, memory))

    def _free(self, number: int) -> None:
        """Tell the sender that a slot is free; runs on whatever thread lets its last tensor go."""
        self._freed.append(number)
        while self._freed:
            try:
                oldest = self._freed.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                self.connection.send(_NUMBER.pack(oldest))
            except BlockingIOError:  # the sender reads them when it sends; the next free one tells of this too
                self._freed.append(oldest)
                return
            except OSError:
                return
