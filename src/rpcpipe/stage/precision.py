"""Mixed precision: torch.autocast on the workers, torch's dynamic loss scale on the driver.

float16 gradients below 6e-8 are lost, so the loss is multiplied by the largest scale that causes no
overflow, and the summed gradients are divided by the scale (Micikevicius et al., "Mixed Precision
Training", section 3.2). ``torch.amp.GradScaler`` on the driver adjusts the scale; its only input is
whether the gradients on the workers were finite.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from rpcpipe.errors import ArgumentError

DTYPES = (torch.bfloat16, torch.float16)


def check(dtype: torch.dtype | None) -> None:
    """Raise ArgumentError unless ``dtype`` is None or in DTYPES."""
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"autocast must be torch.bfloat16, torch.float16 or None, not {dtype!r}")


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Return ``torch.autocast`` to ``dtype`` on ``device``, or a null context if ``dtype`` is None.

    The context is entered once for a run of layers, as a plain loop enters it once for the model: a weight
    that is used twice inside is cast once, and its gradients are summed in ``dtype``.
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def loss_scaler(dtype: torch.dtype | None) -> torch.amp.GradScaler | None:
    """Return a GradScaler for float16, else None: bfloat16 has the range of float32 and needs no loss scale."""
    return torch.amp.GradScaler("cpu") if dtype is torch.float16 else None


def update_loss_scale(scaler: torch.amp.GradScaler, *, finite: bool) -> None:
    """Call ``scaler.update()`` after a step, with a stand-in parameter whose gradient is finite or infinite."""
    stand_in = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([stand_in], lr=0.0)
    scaler.scale(stand_in.detach())  # initializes the scaler's state on first use
    stand_in.grad = torch.tensor(0.0 if finite else math.inf)
    scaler.unscale_(optimizer)
    scaler.update()
