"""What can be seen of a loss before it is called: parameters of its own, and a sum where the mean is expected."""

from __future__ import annotations

import copy
import functools
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ModelError, require
from rpcpipe.model.microbatch import MicroBatches, Nest, tensors


def check(loss: Any) -> None:
    """Raise ModelError for a loss that has trainable parameters, or is a loss of torch's that returns the sum."""
    trainable = next(_trainable(loss), None)
    require(
        trainable is None,
        f"the loss has a trainable parameter, {trainable}, and the optimizer has only those of the layers: it would not"
        " be trained nor saved. Make it a layer, the model's last, whose output the loss takes; or freeze it by"
        " requires_grad_(False)",
        error=ModelError,
    )
    summed = _summed(loss, {})
    require(
        summed is None,
        f"{summed} returns the sum over a micro-batch, and a loss returns the mean, or (sum, count); leave out"
        " reduction='sum', or return the count too: lambda output, target: (sum, target.numel())",
        error=ModelError,
    )


def prepared(loss: Any, targets: Nest) -> Nest:
    """Return what the loss's ``prepare``, if any, makes of ``targets``, or of each micro-batch of MicroBatches."""
    prepare = getattr(loss, "prepare", None)
    if prepare is None:
        return targets
    if isinstance(targets, MicroBatches):
        return MicroBatches([prepare(part) for part in targets.parts], targets.weights)
    return prepare(targets)


def value_and_count(returned: Any) -> tuple[torch.Tensor, Any]:
    """Return the loss and the count, or None, that a loss has returned; raises ModelError for anything else."""
    value, count = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if not isinstance(value, torch.Tensor) or value.dim():
        shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise ModelError(
            f"loss must return a scalar tensor (the mean), or (sum, count), not {shape}; reduce it, for instance by"
            " .mean(), and return what else is of interest as metrics={…} of train_step"
        )
    if value.is_complex() or value.is_meta:
        raise ModelError(
            f"loss must return a real number on the model's device, not {value.dtype} on {value.device}; for complex"
            " values return for instance .abs().mean()"
        )
    if not (count is None or _is_count(count)):
        raise ModelError(
            f"the second value that loss returned is not a count of samples, but {count!r:.100}: return the mean alone,"
            " or (sum, count) with a number; what else is of interest goes into metrics={…} of train_step"
        )
    return value, count


def check_graph(value: torch.Tensor, outputs: Any) -> None:
    """Raise ModelError for a loss that requires a gradient and was computed from nothing."""
    made = value.grad_fn is not None or not value.requires_grad
    if not made and all(value is not output for output in tensors(outputs)):
        raise ModelError(
            "the loss requires a gradient and does not depend on the model's output, so nothing would be trained; it is"
            " a new tensor (torch.tensor(…, requires_grad=True)?): compute it from the output by torch's operations"
        )


def check_alike(count: Any, other: Any) -> None:
    """Raise ModelError for counts of two micro-batches of a batch of which only one is None."""
    require(
        (count is None) == (other is None),
        "loss returned the mean for one micro-batch of a batch and (sum, count) for another, which cannot be added up:"
        " return the same kind for all",
        error=ModelError,
    )


def _is_count(count: Any) -> bool:
    """Return whether ``count`` is a finite number and not negative; on a GPU its value is not waited for."""
    if isinstance(count, torch.Tensor):
        if count.numel() != 1 or count.requires_grad or count.is_complex() or count.is_meta:
            return False
        if count.device.type != "cpu":
            return True
        count = count.item()
    return isinstance(count, numbers.Real) and 0 <= float(count) < math.inf


def state(loss: Any) -> dict[str, Any]:
    """Return a copy of what the loss remembers: its ``state_dict``, if it has one that it can load."""
    if not hasattr(loss, "state_dict") or not hasattr(loss, "load_state_dict"):
        return {}
    return copy.deepcopy(dict(loss.state_dict()))


def _trainable(loss: Any, name: str = "") -> Iterator[str]:
    """Yield the names of the trainable parameters in a module, or in a partial, bound method or object of modules."""
    prefix = f"{name}." if name else ""
    if isinstance(loss, nn.Module):
        yield from (repr(prefix + path) for path, parameter in loss.named_parameters() if parameter.requires_grad)
    elif isinstance(loss, torch.Tensor):
        yield from [repr(name)] if loss.requires_grad else []
    elif isinstance(loss, functools.partial):
        yield from _trainable(loss.func, name)
        for key, value in (*enumerate(loss.args), *loss.keywords.items()):
            yield from _trainable(value, f"{prefix}{key}")
    elif (owner := getattr(loss, "__self__", None)) is not None and not isinstance(owner, type(torch)):
        yield from _trainable(owner, name)
    elif not isinstance(loss, type) and not hasattr(loss, "__code__"):
        for key, value in getattr(loss, "__dict__", {}).items():
            if isinstance(value, (nn.Module, torch.Tensor, functools.partial)):
                yield from _trainable(value, f"{prefix}{key}")


def _summed(loss: Any, keywords: Mapping[str, Any]) -> str | None:
    """Return what ``loss`` is if it is torch's and sums."""
    if isinstance(loss, functools.partial):
        return _summed(loss.func, {**loss.keywords, **keywords})
    module = loss if isinstance(loss, nn.Module) else getattr(loss, "__self__", None)
    if isinstance(module, nn.Module):
        name, own = type(module).__name__, type(module).forward.__module__.startswith("torch.nn.")
        sums = getattr(module, "reduction", "") == "sum"
    else:
        name = getattr(loss, "__name__", "")
        own = bool(name) and getattr(nn.functional, name, None) is loss
        sums = keywords.get("reduction") == "sum" or keywords.get("size_average") is False
    return f"{name}(reduction='sum')" if own and sums else None
