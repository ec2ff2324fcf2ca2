"""Keep strangers away from this process's RPC port, whose protocol trusts whoever connects.

torch's agent runs what it is sent and aborts on what it cannot read; it offers no way to close its port. The kernel can
be told, by a socket filter, which packets reach a socket. Outside of the short times in which a group forms or lets
somebody in, the port takes no packet at all. Meanwhile it takes connections from the members' hosts; those from this
host are given nothing that was sent until the kernel has said that their other end is this user's.
"""

from __future__ import annotations

import ctypes
import ipaddress
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Collection, Iterator
from typing import Any

# Linux's; not in the module socket
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
_POLL_SECONDS = 0.001

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant: linux/filter.h
Program = list[Instruction]
Place = tuple[str, int]  # address, port

# Codes of classic BPF. A packet begins with its TCP header; what is before is reached by negative places.
_LOAD_WORD, _LOAD_BYTE, _LOAD_LENGTH = 0x20, 0x30, 0x80
_SHIFT_LEFT, _SHIFT_RIGHT, _TO_X = 0x64, 0x74, 0x07
_IF_EQUAL, _IF_EQUAL_X, _IF_BITS = 0x15, 0x1D, 0x45
_RETURN = 0x06
_IP_HEADER = 0x1_0000_0000 - 0x100000  # SKF_NET_OFF
_FIN_OR_RESET = 0x05
_UNACKNOWLEDGED = 24  # its place in struct tcp_info

_PASS: Instruction = (_RETURN, 0, 0, 0xFFFF_FFFF)
_DROP: Instruction = (_RETURN, 0, 0, 0)
NOTHING: Program = [_DROP]
# Connections are made, but nothing that is sent on them arrives, neither bytes nor their end.
SILENCE: Program = [
    (_LOAD_BYTE, 0, 0, 13),
    (_IF_BITS, 7, 0, _FIN_OR_RESET),
    (_LOAD_BYTE, 0, 0, 12),
    (_SHIFT_RIGHT, 0, 0, 4),
    (_SHIFT_LEFT, 0, 0, 2),
    (_TO_X, 0, 0, 0),
    (_LOAD_LENGTH, 0, 0, 0),
    (_IF_EQUAL_X, 0, 1, 0),
    _PASS,
    _DROP,
]

# Python's own socket objects may change how a socket that others use blocks (socket.setdefaulttimeout).
_libc = ctypes.PyDLL(None, use_errno=True)

log = logging.getLogger("rpcpipe")


class Gate:
    """The gate before the port at which this process's agent listens, closed when it is made.

    ``address`` and ``port``: where that is. ``places``: where the members' agents listen.
    """

    def __init__(self, address: str, port: int) -> None:
        self.address, self.port = address, port
        self.places: set[Place] = set()
        self._done = threading.Event()
        self._watch: threading.Thread | None = None
        self._set(NOTHING)

    @staticmethod
    def close_before_listening(fd: int) -> None:
        """Close the gate of a socket on which nobody listens yet."""
        _attach(fd, NOTHING)

    @property
    def listening(self) -> bool:
        """Return whether the agent still listens: it stops for good when somebody ends while connecting to it."""
        return any(_listens(fd, self.port) for fd, _ in _sockets())

    def open(self) -> None:
        """Let processes on the members' hosts connect, those on this host if they are of this user."""
        self.close()
        settled = {inode for _, inode in _sockets()}
        self._set(admitting(self.address, {host for host, _ in self.places}))
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._admit, args=(settled, self._done), daemon=True, name="rpcpipe-gate")
        self._watch.start()

    def close(self) -> None:
        """Let nobody connect any more; who has not been let in before never will be."""
        if (watch := self._watch) is None:
            return
        self._watch = None
        self._set(NOTHING)
        self._done.set()
        watch.join()

    def _admit(self, settled: set[int], done: threading.Event) -> None:
        """Let in those who connect from this host as this user, until ``done``; ``settled``: inodes of sockets."""
        while not done.wait(_POLL_SECONDS):
            self._look(settled)
        self._look(settled)

    def _look(self, settled: set[int]) -> None:
        """Let in whoever may be, and answer those who have let this process in."""
        for fd, inode in _sockets():
            if inode in settled or (ends := _ends(fd)) is None:
                continue
            here, there = ends
            if here == (self.address, self.port):
                if user_of(there, here) == os.geteuid():
                    _let_in(fd)
            elif there in self.places and not _resend(fd):
                continue
            settled.add(inode)

    def _set(self, program: Program) -> None:
        """Let ``program`` decide what reaches the listening socket, and the connections made from now on."""
        for fd, _ in _sockets():
            if _listens(fd, self.port) and (error := _attach(fd, program)):
                log.warning(
                    "this kernel takes no socket filter (%s): other users and hosts can reach the RPC port %s:%d",
                    error, self.address, self.port,
                )  # fmt: skip


def admitting(own: str, hosts: Collection[str]) -> Program:
    """Return the program that lets through what comes from ``hosts``, but of what comes from ``own`` only silence."""
    program: Program = []
    for host in sorted({*hosts} - {own}):
        program += [*_unless_from(host, 1), _PASS]
    return [*program, *_unless_from(own, len(SILENCE)), *SILENCE, _DROP]


def _unless_from(host: str, skipped: int) -> Program:
    """Return instructions that skip the next ``skipped`` ones for packets that are not from ``host``."""
    address = ipaddress.ip_address(host)
    words = [word for (word,) in struct.iter_unpack("!I", address.packed)]
    start = _IP_HEADER + (12 if address.version == 4 else 8)
    program: Program = []
    for index, word in enumerate(words):
        left = 2 * (len(words) - 1 - index)
        program += [(_LOAD_WORD, 0, 0, start + 4 * index), (_IF_EQUAL, 0, left + skipped, word)]
    return program


def user_of(end: Place, other: Place) -> int | None:
    """Return the user who has a socket on this host at ``end``, connected to ``other``; None if nobody has."""
    family = socket.AF_INET6 if ":" in end[0] else socket.AF_INET
    ports, addresses = struct.pack("!HH", end[1], other[1]), [_packed(place[0]) for place in (end, other)]
    wanted = ports + b"".join(address.ljust(16, b"\0") for address in addresses) + bytes(4) + b"\xff" * 8
    request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFF_FFFF) + wanted
    header = struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.sendto(header + request, (0, 0))
        answer = kernel.recv(4096)
    if struct.unpack_from("=H", answer, 4)[0] != _SOCK_DIAG_BY_FAMILY:
        return None
    user, inode = struct.unpack_from("=II", answer, 16 + 4 + len(wanted) + 12)
    return int(user) if inode else None  # what a process has closed belongs to root


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


# --- sockets that are the agent's: it may close them at any time ---
#
# The calls keep the GIL, which others would take for 5 ms at each.


def _sockets() -> Iterator[tuple[int, int]]:
    """Yield another descriptor for each socket that this process has, and the inode; it is open until the next."""
    link = ctypes.create_string_buffer(64)
    for name in os.listdir("/proc/self/fd"):
        fd = _libc.dup(int(name))
        try:
            size = _libc.readlink(f"/proc/self/fd/{fd}".encode(), link, len(link))
            if fd >= 0 and size > 0 and link.raw[:size].startswith(b"socket:["):
                yield fd, int(link.raw[8 : size - 1])
        finally:
            _libc.close(fd)


def _ends(fd: int) -> tuple[Place, Place] | None:
    """Return both ends of a TCP connection; None for what is none, or none yet."""
    here, there = _place(fd, _libc.getsockname), _place(fd, _libc.getpeername)
    return (here, there) if here is not None and there is not None else None


def _place(fd: int, ask: Any) -> Place | None:
    buffer, size = ctypes.create_string_buffer(28), ctypes.c_uint(28)
    if ask(fd, buffer, ctypes.byref(size)) < 0:
        return None
    name = buffer.raw
    family, port = struct.unpack("=H", name[:2])[0], struct.unpack("!H", name[2:4])[0]
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    return str(ipaddress.ip_address(name[4:8] if family == socket.AF_INET else name[8:24])), port


def _listens(fd: int, port: int) -> bool:
    """Return whether ``fd`` is a TCP socket that listens at ``port``."""
    place = _place(fd, _libc.getsockname)
    return place is not None and place[1] == port and any(_option(fd, socket.SOL_SOCKET, socket.SO_ACCEPTCONN, 4))


# What the gate has dropped the kernel sends again after 200 ms, or at once when it hears that something later has
# arrived. An urgent byte is something, and no part of what the other end reads if it is the only one in its direction.
# So who has let somebody in sends one, and is answered by one.


def _let_in(fd: int) -> None:
    """Let what is sent on a connection arrive from now on, and say so; do nothing where this has been done before."""
    if _libc.setsockopt(fd, socket.SOL_SOCKET, _SO_DETACH_FILTER, bytes(4), 4) == 0:
        _send_urgent(fd)


def _resend(fd: int) -> bool:
    """Have what was dropped at the other end sent again, if that has let this process in; return whether it has."""
    events = ctypes.create_string_buffer(struct.pack("=iHH", fd, select.POLLPRI, 0))
    if _libc.poll(events, 1, 0) != 1:
        return False
    if any(_option(fd, socket.IPPROTO_TCP, socket.TCP_INFO, 28)[_UNACKNOWLEDGED:]):
        _send_urgent(fd)
    return True


def _send_urgent(fd: int) -> None:
    _libc.send(fd, b"\0", 1, socket.MSG_OOB | socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _attach(fd: int, program: Program) -> str:
    """Let ``program`` decide what reaches a socket; return why the kernel refuses, '' if it does not."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    option = struct.pack("HP", len(program), ctypes.addressof(code))
    refused = _libc.setsockopt(fd, socket.SOL_SOCKET, _SO_ATTACH_FILTER, option, len(option)) < 0
    return os.strerror(ctypes.get_errno()) if refused else ""


def _option(fd: int, level: int, option: int, size: int) -> bytes:
    value, length = ctypes.create_string_buffer(size), ctypes.c_uint(size)
    _libc.getsockopt(fd, level, option, value, ctypes.byref(length))
    return value.raw
