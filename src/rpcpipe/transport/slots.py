"""Memory that two processes have mapped, and the tensors of a message in it."""

from __future__ import annotations

import ctypes
import functools
import io
import math
import mmap
import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from rpcpipe.transport.message_pickling import TensorsAside

_ALIGNMENT = 64  # bytes: what kernels choose by alignment must not depend on the way a tensor came

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong,
]  # fmt: skip
_FAILED = ctypes.c_void_p(-1).value


def map_file(descriptor: int, size: int, flags: int = 0) -> tuple[int, Callable[[], Any]]:
    """Map a file, which may be shorter for now; return the address, and what unmaps it. Adds ``flags`` to mmap's."""
    protection, shared = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | flags
    address = _LIBC.mmap(None, size, protection, shared, descriptor, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    return address, functools.partial(_LIBC.munmap, ctypes.c_void_p(address), ctypes.c_size_t(size))


def mapped(descriptor: int, size: int) -> memoryview:
    """Return the memory of a file, mapped as long as something refers to it; unlike ``mmap`` without a descriptor."""
    address, unmap = map_file(descriptor, size)
    array = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(array, unmap).atexit = False
    return memoryview(array).cast("B")


class Shape(NamedTuple):
    """Where a tensor is in a slot, and how it is laid out."""

    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


def copy_into(tensors: Sequence[torch.Tensor], shapes: Sequence[Shape], memory: memoryview, address: int) -> None:
    """Copy ``tensors`` to their places in ``memory``, which begins at ``address``."""
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.is_contiguous():
            # torch's own copy wakes a thread for every core, in a process that has not set their number.
            ctypes.memmove(address + shape.offset, tensor.data_ptr(), tensor.nbytes)
        else:
            _view(memory, shape).copy_(tensor)


def _view(memory: Any, shape: Shape) -> torch.Tensor:
    """Return the tensor at its place in ``memory``, which it keeps alive."""
    offset, dtype, size, stride = shape
    count = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).as_strided(size, stride)


# The commonest message, builtins and a list of dense tensors, needs no pickler. Where kernels have just run and caches
# are cold, the general way takes a compute thread 0.2 ms for a message.
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8,
)  # fmt: skip
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
# By tensor: where it is in the slot, its dtype's code, its size. Builtins alone, for marshal.
Layout = list[tuple[int, int, tuple[int, ...]]]


def dense_layout(tensors: Sequence[torch.Tensor]) -> tuple[Layout, int] | None:
    """Return how ``tensors`` lie in a slot, and its bytes; None unless all can be copied byte by byte."""
    layout, size = [], 0
    for tensor in tensors:
        if type(tensor) is not torch.Tensor or tensor.dtype not in _CODES or not _is_plain(tensor):
            return None
        # A dimension of size 1 may have any stride, and kernels choose by it.
        if not tensor.is_contiguous() or (1 in tensor.shape and tensor.stride() != _row_major(tensor.shape)):
            return None
        layout.append((size, _CODES[tensor.dtype], tuple(tensor.shape)))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return layout, size


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense tensor of ``shape``."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def copy_dense(tensors: Sequence[torch.Tensor], layout: Layout, address: int) -> None:
    """Copy ``tensors`` into the slot at ``address``."""
    for tensor, (offset, _, _) in zip(tensors, layout, strict=True):
        ctypes.memmove(address + offset, tensor.data_ptr(), tensor.nbytes)


def dense_tensors(layout: Layout, memory: memoryview) -> list[torch.Tensor]:
    """Return the tensors that lie in ``memory``, which they keep alive."""
    return [
        torch.frombuffer(memory, dtype=_DTYPES[code], count=math.prod(size), offset=offset).view(size)
        for offset, code, size in layout
    ]


def address_of(memory: memoryview) -> int:
    """Return where ``memory`` begins."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))


class TensorPickler(TensorsAside):
    """Lays tensors out in a slot of ``size`` bytes. ``plain``: all of them can be copied there."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        self.shapes: list[Shape] = []
        self.size, self.plain = 0, True

    def aside(self, tensor: torch.Tensor) -> tuple[Any, tuple[Shape]]:
        self.plain = self.plain and _is_plain(tensor)
        if not self.plain:
            return _tensor, (Shape(0, tensor.dtype, (), ()),)
        # As empty_like lays out a copy: dense memory in its own order, else row by row.
        like = tensor if tensor.is_contiguous() else torch.empty_like(tensor, device="meta")
        shape = Shape(self.size, tensor.dtype, tuple(tensor.shape), like.stride())
        self.tensors.append(tensor)
        self.shapes.append(shape)
        self.size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        return _tensor, (shape,)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.numel() > 0
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_nested)
        and not torch._is_zerotensor(tensor)
    )


_unpickling = threading.local()


def _tensor(shape: Shape) -> torch.Tensor:
    """Return a tensor of the message that this thread unpickles."""
    return _view(_unpickling.memory, shape)


def unpickled(data: memoryview, memory: memoryview) -> Any:
    """Return a message whose tensors are views of ``memory``, which they keep alive."""
    _unpickling.memory = memory
    try:
        return pickle.loads(data)
    finally:
        del _unpickling.memory
