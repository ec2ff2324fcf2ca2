"""Find optimizers that treat their parameters together: on a worker, they would see only a part of the model's.

Copies of the optimizer, over stand-ins of a few elements, update with the gradients of all parameters and with those of
some; what these get must be the same. Nothing of the optimizer itself, its parameters or the random state is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rpcpipe.stage.hyperparameters import entries, same
from rpcpipe.stage.twin import stand_in, step, trial, twin

# An update that differs by less than this share of itself may be a matter of rounding.
_TOLERANCE = 0.01
# Larger than what an optimizer would clip to.
_GRADIENT = 100.0


def is_separable(optimizer: torch.optim.Optimizer) -> bool:
    """Return False if the first update of a parameter depends on other parameters' gradients, and no entry says so.

    Entries of groups that depend on them are compared at every update. An optimizer that cannot be copied, or cannot
    update the stand-ins, counts as separable.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(parameters) < 2:
        return True
    try:
        with trial():
            whole, groups = _updated(optimizer, parameters, 1)
            some, other = _updated(optimizer, parameters, 2)
            alike = all(same(one[key], two.get(key)) for one, two in zip(groups, other, strict=True) for key in one)
            return not alike or all(map(_close, whole[::2], some[::2]))
    except Exception:
        return True


def _updated(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], every: int
) -> tuple[list[torch.Tensor], list[dict[str, object]]]:
    """Return the stand-ins after an update with the gradient of one in ``every``, and the optimizer's entries."""
    stand_ins = {parameter: stand_in(parameter) for parameter in parameters}
    made = twin(optimizer, stand_ins)
    for index, parameter in enumerate(stand_ins.values()):
        if index % every == 0:
            parameter.grad = torch.full_like(parameter, _GRADIENT * (1 + index % 3))
    step(made)
    return [parameter.detach() for parameter in stand_ins.values()], entries(made)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    moved = torch.maximum((one - 0.5).abs(), (other - 0.5).abs())
    rounding = 8 * torch.finfo(one.dtype).eps
    return bool(((one - other).abs() <= _TOLERANCE * moved + rounding).all())
