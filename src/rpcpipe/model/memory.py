"""Where tensors lie in memory, and what the heap keeps of it."""

from __future__ import annotations

import ctypes

import torch


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where in its storage a strided tensor with elements begins and ends, in bytes."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + reach + 1) * tensor.element_size()


def give_heap_back() -> None:
    """Give the heap's free pages back to the system, which a worker's allocator never does by itself."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(ctypes.c_size_t(0))
