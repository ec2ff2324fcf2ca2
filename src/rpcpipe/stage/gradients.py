"""Gradients in ``.grad``: pass them to the step's distributed-autograd context without a copy; norms and scaling.

Running every micro-batch's backward through the distributed engine costs 10-15 % of a step. The stage
therefore accumulates locally and passes the sums to the engine once per step, as the gradients that the
backward of one function of all parameters returns. The backward empties its list of gradients, so that
the engine is their only owner and the context keeps the tensors without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class HandOver(torch.autograd.Function):
    """A scalar zero whose gradient with respect to each parameter is that parameter's entry in ``gradients``."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        reversed_gradients = ctx.gradients[::-1]
        ctx.gradients.clear()
        return (None, *(reversed_gradients.pop() for _ in range(len(reversed_gradients))))


def take(parameters: Sequence[nn.Parameter]) -> torch.Tensor | None:
    """Clear the parameters' ``.grad`` and return a scalar whose backward yields them; None if there are none."""
    owners = [parameter for parameter in parameters if parameter.grad is not None]
    if not owners:
        return None
    gradients = [parameter.grad for parameter in owners]
    for parameter in owners:
        parameter.grad = None
    scalar: torch.Tensor = HandOver.apply(gradients, *owners)  # type: ignore[no-untyped-call]
    return scalar


def norms(parameters: Sequence[nn.Parameter]) -> list[float]:
    """Return the 2-norms of the gradients, in the order of ``parameters``; those without a gradient are left out."""
    grads = [_values(parameter.grad) for parameter in parameters if parameter.grad is not None]
    values: list[float] = torch.stack(torch._foreach_norm(grads)).tolist() if grads else []
    return values


def _values(gradient: torch.Tensor) -> torch.Tensor:
    """Return the elements of ``gradient`` that are not zero, if it is sparse, and else itself."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def finite(parameters: Sequence[nn.Parameter]) -> bool:
    """Return whether the norm of every gradient is finite."""
    return all(map(math.isfinite, norms(parameters)))


def total_norm(per_parameter: Sequence[float]) -> float:
    """Return the gradient norm of the whole model, with the bits of ``torch.nn.utils.get_total_norm``.

    The bits agree for float32 gradients whose norms are in the order of the model's parameters.
    """
    return float(torch.linalg.vector_norm(torch.tensor(per_parameter, dtype=torch.float32)))


def clip_factor(norm: float, max_norm: float) -> float:
    """Return the factor by which ``torch.nn.utils.clip_grad_norm_`` multiplies, computed in float32 as there."""
    return float(torch.clamp(max_norm / (torch.tensor(norm, dtype=torch.float32) + 1e-6), max=1.0))


def unscale(parameters: Sequence[nn.Parameter], scale: float) -> None:
    """Divide the gradients by the loss scale, with the bits of ``torch.amp.GradScaler.unscale_``."""
    if scale != 1.0:
        inverse = torch.tensor(scale, dtype=torch.float64).reciprocal().float()
        for parameter in parameters:
            if parameter.grad is not None:
                # Not in place: a message to another replica may still read the old tensor.
                parameter.grad = parameter.grad * float(inverse)


def divide(parameters: Sequence[nn.Parameter], divisor: float) -> None:
    """Divide the gradients by ``divisor`` in place, which turns sums over samples into means."""
    _each(parameters, torch._foreach_div_, divisor)


def scale(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply the gradients by ``factor`` in place, for clipping."""
    _each(parameters, torch._foreach_mul_, factor)


def _each(parameters: Sequence[nn.Parameter], change: Callable[[list[torch.Tensor], float], Any], by: float) -> None:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if grads:
        change(grads, by)
