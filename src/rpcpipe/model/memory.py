"""Where tensors lie in memory."""

from __future__ import annotations

import torch


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where in its storage a strided tensor with elements begins and ends, in bytes."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + reach + 1) * tensor.element_size()
