"""Have a socket's gate closed before torch's agent listens on it.

Between the agent's ``listen`` and the first line of ours that can run there are milliseconds, enough for another user
of the host to connect and be heard. So while the agent starts, the entry of ``listen`` in the table through which its
library calls the system's functions (GOT, of the ELF file format) leads here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

_LIBRARY = "libtorch_cpu.so"
_PT_DYNAMIC = 2
_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_JMPREL = 2, 5, 6, 10, 23

_Listen = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int)
_libc = ctypes.PyDLL(None)


@contextlib.contextmanager
def before_listening(act: Callable[[int], object]) -> Iterator[None]:
    """Within the context, call ``act(descriptor)`` just before torch listens on a socket.

    Does nothing where torch's library is not built as in torch's own packages: see ``entry_of_listen``.
    """

    def listen(fd: int, backlog: int) -> int:
        act(fd)
        return int(_libc.listen(fd, backlog))

    if (address := entry_of_listen()) is None:
        yield
        return
    callback = _Listen(listen)
    entry = ctypes.c_void_p.from_address(address)
    before = entry.value
    entry.value = ctypes.cast(callback, ctypes.c_void_p).value
    try:
        yield
    finally:
        entry.value = before


@functools.cache
def entry_of_listen() -> int | None:
    """Return the address of the table's entry for ``listen``; None where it cannot be found, or written."""
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(_LIBRARY)]
    if not mapped:
        return None
    base = int(mapped[0][0].partition("-")[0], 16)
    dynamic = dict(_dynamic(base))
    if not {_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_JMPREL} <= dynamic.keys():
        return None
    # The loader may have made addresses of the offsets.
    strings, symbols, relocations = (
        value if (value := dynamic[tag]) > base else base + value for tag in (_DT_STRTAB, _DT_SYMTAB, _DT_JMPREL)
    )
    names = _memory(strings, dynamic[_DT_STRSZ])
    for offset, info, _ in struct.iter_unpack("=QQq", _memory(relocations, dynamic[_DT_PLTRELSZ])):
        name = ctypes.c_uint32.from_address(symbols + 24 * (info >> 32)).value
        if names.startswith(b"listen\0", name):
            return base + offset if _writable(base + offset) else None
    return None


def _dynamic(base: int) -> Iterator[tuple[int, int]]:
    """Yield the tags and values of the dynamic section of the 64-bit library at ``base``."""
    header = _memory(base, 64)
    start, size, count = (*struct.unpack_from("=Q", header, 32), *struct.unpack_from("=HH", header, 54))
    for index in range(count):
        kind, _, _, address, _, _, length, _ = struct.unpack("=IIQQQQQQ", _memory(base + start + index * size, 56))
        if kind == _PT_DYNAMIC:
            yield from struct.iter_unpack("=qQ", _memory(base + address, length))


def _memory(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def _writable(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights, *_ = line.split()
        first, last = (int(end, 16) for end in place.split("-"))
        if first <= address < last:
            return rights.startswith("rw")
    return False
