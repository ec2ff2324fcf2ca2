"""From a stage's ``.grad`` to the step's distributed-autograd context, without a copy.

Running every micro-batch's backward through the distributed engine costs 10-15 % of a step. The
stage accumulates locally instead and files the sums once: a function of all parameters whose
backward hands the engine the finished gradients. The list is emptied as they are handed out, so
the engine is their only owner and the context keeps the tensors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class HandOver(torch.autograd.Function):
    """A zero whose gradient with respect to each parameter is the list's entry."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given = ctx.gradients[::-1]
        ctx.gradients.clear()
        return (None, *(given.pop() for _ in range(len(given))))


def take(parameters: Sequence[nn.Parameter]) -> torch.Tensor | None:
    """A scalar whose backward yields the parameters' ``.grad``, which are cleared; None if all are."""
    owners = [parameter for parameter in parameters if parameter.grad is not None]
    if not owners:
        return None
    gradients = [parameter.grad for parameter in owners]
    for parameter in owners:
        parameter.grad = None
    scalar: torch.Tensor = HandOver.apply(gradients, *owners)  # type: ignore[no-untyped-call]
    return scalar


def norms(parameters: Sequence[nn.Parameter]) -> list[float]:
    """The 2-norm of every gradient, in the order of those parameters that have one."""
    present = [parameter.grad for parameter in parameters if parameter.grad is not None]
    found: list[float] = torch.stack(torch._foreach_norm(present)).tolist() if present else []
    return found


def finite(parameters: Sequence[nn.Parameter]) -> bool:
    """Is no gradient's norm NaN or Inf?"""
    return all(map(math.isfinite, norms(parameters)))


def total_norm(per_parameter: Sequence[float]) -> float:
    """The whole model's gradient norm: to the bit what ``torch.nn.utils.get_total_norm`` gives.

    Holds for float32 gradients given in the model's parameter order.
    """
    return float(torch.linalg.vector_norm(torch.tensor(per_parameter, dtype=torch.float32)))


def clip_factor(norm: float, max_norm: float) -> float:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies by, computed in float32 as it does."""
    return float(torch.clamp(max_norm / (torch.tensor(norm, dtype=torch.float32) + 1e-6), max=1.0))


def unscale(parameters: Sequence[nn.Parameter], scale: float) -> None:
    """Take the loss scale out again, with the bits of ``torch.amp.GradScaler.unscale_``."""
    if scale != 1.0:
        inverse = torch.tensor(scale, dtype=torch.float64).reciprocal().float()
        for parameter in parameters:
            if parameter.grad is not None:
                # Not in place: what was pushed to another replica may still be on its way.
                parameter.grad = parameter.grad * float(inverse)


def divide(parameters: Sequence[nn.Parameter], divisor: float) -> None:
    """Turn sums of per-sample gradients into means, in place."""
    _each(parameters, lambda grads: torch._foreach_div_(grads, divisor))


def scale(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply the gradients in place (clipping)."""
    _each(parameters, lambda grads: torch._foreach_mul_(grads, factor))


def _each(parameters: Sequence[nn.Parameter], change: Any) -> None:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if grads:
        change(grads)
