"""Try an optimizer out on stand-ins for its parameters: neither it, its parameters nor random numbers are touched."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

Optimizer = torch.optim.Optimizer


def stand_in(parameter: torch.Tensor) -> nn.Parameter:
    """Return a parameter of the same dtype and number of dimensions, with two elements at most in each."""
    return nn.Parameter(torch.full([min(size, 2) for size in parameter.shape], 0.5, dtype=parameter.dtype))


@contextmanager
def trial() -> Iterator[None]:
    """Run the block on the CPU, whatever the default device is, and without a trace in random numbers or warnings."""
    random = torch.default_generator.get_state()
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.device("cpu"):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.default_generator.set_state(random)


def twin(optimizer: Optimizer, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> Optimizer:
    """Return a copy of ``optimizer`` over ``stand_ins``, which has its groups and no parameter's state.

    Raises whatever copying its attributes raises.
    """
    kind = type(optimizer)
    made = kind.__new__(kind)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = copy.copy(optimizer.state)
    state.clear()
    memo: dict[int, object] = {id(optimizer): made, id(optimizer.state): state}
    memo |= {id(p): stand_ins[p] if p in stand_ins else nn.Parameter(torch.empty(0)) for p in parameters}
    plain = {key: value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)}
    state.update(copy.deepcopy(plain, memo))
    # Not deepcopy(optimizer), which leaves attributes out. A step of the object itself is a scheduler's, and hooks may
    # refer to anything.
    own = {
        name: OrderedDict() if name.endswith("_hooks") else value
        for name, value in vars(optimizer).items()
        if name != "step"
    }
    vars(made).update(copy.deepcopy(own, memo))
    return made


def step(made: Optimizer) -> None:
    """Let a twin update its stand-ins by their gradients; raises what the optimizer's class raises."""
    type(made).step(made)
