"""Gradients in ``.grad``: pass them to the step's distributed-autograd context without a copy; norms and scaling.

Running every micro-batch's backward through the distributed engine costs 10-15 % of a step. The stage
therefore accumulates locally and passes the sums to the engine once per step, as the gradients that the
backward of one function of all parameters returns. The backward empties its list of gradients, so that
the engine is their only owner and the context keeps the tensors without a copy.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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


def hooks_of(parameter: torch.Tensor) -> tuple[Any, Any]:
    """Return the hooks that run on the parameter's gradient, and those that run after it is accumulated; or None."""
    return parameter._backward_hooks, parameter._post_accumulate_grad_hooks


def has_hooks(parameter: torch.Tensor) -> bool:
    """Return whether a hook runs when the parameter's gradient is computed or accumulated."""
    return any(hooks_of(parameter))


def remove_hooks(parameter: torch.Tensor) -> None:
    """Remove the parameter's hooks for good."""
    for hooks in filter(None, hooks_of(parameter)):
        hooks.clear()


@contextmanager
def hooks_lifted(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Take the hooks off ``parameters`` and put them back, whatever happens.

    Hooks have run on every micro-batch's gradient; filing the sums is no further backward to them.
    """
    lifted = [(parameter, *hooks_of(parameter)) for parameter in parameters if has_hooks(parameter)]
    try:
        for parameter, before, after in lifted:
            # Empty dicts: torch keeps a tensor's hooks when ``_post_accumulate_grad_hooks`` is set to None.
            _set_hooks(parameter, before and OrderedDict(), after and OrderedDict())
        yield
    finally:
        for hooked in lifted:
            _set_hooks(*hooked)


def _set_hooks(parameter: torch.Tensor, before: Any, after: Any) -> None:
    parameter._backward_hooks = before
    if after is not None:
        parameter._post_accumulate_grad_hooks = after


def norms(parameters: Sequence[nn.Parameter]) -> list[float]:
    """Return the 2-norms of the gradients, in the order of ``parameters``; those without a gradient are left out."""
    grads = [_values(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not grads:
        return []
    if any(grad.dtype == torch.float16 for grad in grads):  # its own norm overflows from 65504 on
        found = [torch.linalg.vector_norm(grad, dtype=_wide(grad.dtype)) for grad in grads]
    else:
        found = list(torch._foreach_norm(grads))
    values: list[float] = torch.stack(found).tolist()
    return values


def _values(gradient: torch.Tensor) -> torch.Tensor:
    """Return the elements of ``gradient`` that are not zero, if it is sparse, and else itself."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def norm_dtype(parameters: Sequence[nn.Parameter]) -> torch.dtype:
    """Return the precision of the norm of all gradients: torch's, but float32 for float16."""
    dtypes = {parameter.grad.dtype for parameter in parameters if parameter.grad is not None}
    return joint_dtype(_wide(dtype.to_real()) for dtype in dtypes)


def joint_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype to which torch promotes ``dtypes``; float32 if there are none."""
    found = list(dtypes)
    return functools.reduce(torch.promote_types, found) if found else torch.float32


def finite(parameters: Sequence[nn.Parameter]) -> bool:
    """Return whether the norm of every gradient is finite."""
    return all(map(math.isfinite, norms(parameters)))


def total_norm(per_parameter: Sequence[float], dtype: torch.dtype = torch.float32) -> float:
    """Return the gradient norm of the whole model, with the bits of ``torch.nn.utils.get_total_norm``.

    The bits agree for gradients of one dtype, other than float16, whose norms are in the order of the model's
    parameters.
    """
    return float(torch.linalg.vector_norm(torch.tensor(per_parameter, dtype=dtype)))


def clip_factor(norm: float, max_norm: float, dtype: torch.dtype = torch.float32) -> float:
    """Return the factor by which ``torch.nn.utils.clip_grad_norm_`` multiplies, computed in ``dtype`` as there."""
    return float(torch.clamp(max_norm / (torch.tensor(norm, dtype=dtype) + 1e-6), max=1.0))


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
