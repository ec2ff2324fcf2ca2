"""Mixed precision: torch.autocast on the workers, torch's dynamic loss scale on the driver.

float16 gradients below 6e-8 are lost, so the loss is multiplied by a scale as large as it can be
without overflow, and the summed gradients are divided by it (Micikevicius et al., "Mixed Precision
Training", section 3.2). The rule by which it moves is ``torch.amp.GradScaler``'s, by that class
itself; it need only be told whether the gradients on the workers were finite.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from rpcpipe.errors import ArgumentError

DTYPES = (torch.bfloat16, torch.float16)


def check(dtype: torch.dtype | None) -> None:
    """ArgumentError unless ``dtype`` is None or one that autocast computes in."""
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"autocast must be torch.bfloat16, torch.float16 or None, not {dtype!r}")


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """``torch.autocast`` to ``dtype`` on ``device``; None: nothing.

    GraphEntry once for a run of layers, as a plain loop enters it once for the model: a weight that is
    used twice inside is cast once, and its gradient is the sum in ``dtype``.
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def loss_scaler(dtype: torch.dtype | None) -> torch.amp.GradScaler | None:
    """The loss scale that ``dtype`` needs: bfloat16 has float32's range, float16 has not."""
    return torch.amp.GradScaler("cpu") if dtype is torch.float16 else None


def update_loss_scale(scaler: torch.amp.GradScaler, *, finite: bool) -> None:
    """``scaler.update()`` after a step; a stand-in's gradient tells it whether all were finite."""
    stand_in = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([stand_in], lr=0.0)
    scaler.scale(stand_in.detach())  # makes its state, if it has none yet
    stand_in.grad = torch.tensor(0.0 if finite else math.inf)
    scaler.unscale_(optimizer)
    scaler.update()
