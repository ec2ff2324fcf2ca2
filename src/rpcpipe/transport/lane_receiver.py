"""The receiving end of lanes: one thread waits for all of them, and runs what comes."""

from __future__ import annotations

import contextlib
import errno
import logging
import marshal
import mmap
import os
import pickle
import select
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from rpcpipe.transport.interrupts import allow_interrupts
from rpcpipe.transport.roster import sender_of
from rpcpipe.transport.slots import dense_tensors, mapped, unpickled

LONGEST_MESSAGE = 1 << 16  # beside tensors; longer ones go by RPC
# The slot's number (NO_SLOT: none), the size of a slot that is new (else 0), and whether the rest is not pickled.
HEADER = struct.Struct("<IQ?")
# Behind a slot's tensors is a page, in which one byte says whether the slot is free. The sender clears it, the receiver
# sets it.
FLAG_BYTES = mmap.PAGESIZE
LOST_SLOT = struct.Struct("<I")  # what the receiver tells: the number of a slot that it never got
NO_SLOT = (1 << 32) - 1
_DESCRIPTOR = struct.Struct("i")
_ANCILLARY = socket.CMSG_SPACE(_DESCRIPTOR.size)
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_BACKLOG = 1024  # senders that connect while nobody receives
_RETRY = 0.05  # seconds after which a connection is taken again that found no descriptor

log = logging.getLogger("rpcpipe")

# Runs a verb with its arguments.
Handle = Callable[[str, tuple[Any, ...]], object]


class Receiver:
    """The receiving end of all lanes to this process. One thread at a time receives: it runs each verb itself."""

    def __init__(self, handle: Handle, knows: Callable[[str], bool]) -> None:
        self._handle, self._knows = handle, knows  # the latter tells of a wire name whether it is one of the group
        self._listener: socket.socket | None = None
        self._accepting = False
        self._epoll = select.epoll()
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._incoming: dict[int, _Incoming] = {}
        self._epoll.register(self._waker, select.EPOLLIN)
        # Not in close: who wakes a closed receiver must not write to a descriptor that is somebody else's by now.
        weakref.finalize(self, os.close, self._waker).atexit = False
        # Held while a thread receives; by which a signal's handler may receive as well, or close.
        self._lock = threading.RLock()
        self._closed = self._running = self._has_strangers = False

    def listen(self, address: str) -> None:
        """Take connections at ``address``; raises OSError if that cannot be."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(address)
        self._listener.listen(_BACKLOG)
        self._accept_again()

    @property
    def listening(self) -> bool:
        """Return whether others can open lanes to this process."""
        return self._listener is not None and not self._closed

    def receive(self, timeout: float | None, *, interruptible: bool = False) -> bool:
        """Wait up to ``timeout`` seconds, None for ever, for messages or ``wake``, and run them.

        Returns whether there was anything. ``interruptible``: Ctrl-C may end the wait, in a ``shield_interrupts`` block
        nothing else.
        """
        with self._lock:
            if self._closed or self._running:  # running: by this thread, whose message must not be written over
                return False
            ready = self._wait(timeout, interruptible)
            self._running = True
            try:
                for descriptor, _ in ready:
                    self._run(descriptor)
            finally:
                self._running = False
            self._close_strangers()
        return bool(ready)

    def _wait(self, timeout: float | None, interruptible: bool) -> list[tuple[int, int]]:
        if not self._accepting and self._listener is not None:
            self._accept_again()
            timeout = _RETRY if timeout is None else min(timeout, _RETRY)
        if not interruptible:
            return self._epoll.poll(timeout)
        try:
            with allow_interrupts():
                return self._epoll.poll(timeout)
        except (OSError, ValueError):
            if self._closed:  # by a signal's handler
                return []
            raise

    def wake(self) -> None:
        """Let the thread that receives, now or next, return."""
        os.eventfd_write(self._waker, 1)

    def forget_strangers(self) -> None:
        """Close the lanes from those who are not known any more; the thread that receives does, if there is one."""
        self._has_strangers = True
        if not self._lock.acquire(blocking=False):
            self.wake()
            return
        try:
            self._close_strangers()
        finally:
            self._lock.release()

    def _close_strangers(self) -> None:
        if not self._has_strangers or self._running or self._closed:
            return
        self._has_strangers = False
        for descriptor in [one for one, incoming in self._incoming.items() if not self._knows(incoming.sender)]:
            self._end(descriptor)

    def _end(self, descriptor: int) -> None:
        incoming = self._incoming.pop(descriptor)
        self._epoll.unregister(descriptor)
        incoming.connection.close()

    def close(self) -> None:
        """Receive no more."""
        if self._closed:
            return
        self._closed = True
        self.wake()
        with self._lock:  # whoever receives lets go of it: it is awake, and no verb blocks
            for incoming in self._incoming.values():
                incoming.connection.close()
            if self._listener is not None:
                self._listener.close()
            self._epoll.close()

    def _run(self, descriptor: int) -> None:
        if (incoming := self._incoming.get(descriptor)) is not None:
            # Nothing is read of the dead that are replaced.
            if not (self._knows(incoming.sender) and incoming.read()) and not self._closed:
                self._end(descriptor)
        elif descriptor == self._waker:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._waker)
        else:
            self._accept()

    def _accept_again(self) -> None:
        assert self._listener is not None
        self._epoll.register(self._listener, select.EPOLLIN)
        self._accepting = True

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, address = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                # What the sender has sent already waits in the connection, which must not be given up.
                log.error("a lane waits for a free descriptor: %s; raise the limit, ulimit -n", error)
                self._epoll.unregister(self._listener)
                self._accepting = False
            return  # else the sender has gone
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.getuid():
            connection.close()
            return
        connection.setblocking(False)
        self._incoming[connection.fileno()] = _Incoming(connection, sender_of(address), self._handle)
        self._epoll.register(connection, select.EPOLLIN)


class _Incoming:
    """One lane's receiving end."""

    def __init__(self, connection: socket.socket, sender: str, handle: Handle) -> None:
        self.connection = connection
        self.sender = sender  # its wire name
        self._handle = handle
        self._slots: dict[int, memoryview] = {}
        # Kept until they are called: a reference that is gone calls nothing.
        self._references: dict[int, weakref.ref[memoryview]] = {}
        self._buffer = bytearray(HEADER.size + LONGEST_MESSAGE)
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
        number, size, dense = HEADER.unpack_from(data)
        if size:
            self._take_slot(number, size, ancillary)
        verb, args = self._read(data[HEADER.size :], number, dense)
        self._handle(verb, args)

    def _take_slot(self, number: int, size: int, ancillary: Sequence[tuple[int, int, bytes]]) -> None:
        """Map the new slot whose descriptor has come; raises OSError, and the sender uses another."""
        try:
            if not ancillary:  # the kernel drops it when this process has no descriptor free
                raise OSError(errno.EMFILE, "the message's tensors are lost: no descriptor is free; raise ulimit -n")
            (descriptor,) = _DESCRIPTOR.unpack(ancillary[0][2])
            try:
                self._slots[number] = mapped(descriptor, size + FLAG_BYTES)
            finally:
                os.close(descriptor)
        except OSError:
            with contextlib.suppress(OSError):  # the sender's memory stays in use for nothing
                self.connection.send(LOST_SLOT.pack(number))
            raise

    def _read(self, data: memoryview, number: int, dense: bool) -> Any:
        if number == NO_SLOT:
            if not dense:
                return pickle.loads(data)
            verb, args, _ = marshal.loads(data)
            return verb, (*args, [])
        # All tensors of the message refer to this view; when the last has gone, it goes.
        slot = self._slots[number]
        memory = memoryview(slot)
        self._references[number] = weakref.ref(memory, lambda _: _set_free(slot))
        if not dense:
            return unpickled(data, memory)
        verb, args, layout = marshal.loads(data)
        return verb, (*args, dense_tensors(layout, memory))


def _set_free(slot: memoryview) -> None:
    """Let the sender use a slot again; runs on whatever thread lets its last tensor go."""
    slot[-FLAG_BYTES] = 1
