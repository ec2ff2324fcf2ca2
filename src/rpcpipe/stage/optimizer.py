"""The worker's part of the distributed optimizer: one torch optimizer over the parameters of its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from rpcpipe.stage.rollback import Undo


class Parameters(list[nn.Parameter]):
    """A worker's trainable parameters in the model's order, the argument of the user's optimizer factory."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)
        super().__init__(parameter for _, parameter in self._named)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name in the unsplit model's ``state_dict``, parameter) for each parameter."""
        return list(self._named)


Factory = Callable[[Parameters], torch.optim.Optimizer]


class LocalOptimizer:
    """One worker's optimizer: the user's optimizer over the parameters of the worker's stages.

    Parameters in ``elsewhere`` are updated on other workers; this worker only restores them after a failed step.
    """

    def __init__(self, factory: Factory, parameters: Parameters, elsewhere: Set[nn.Parameter] = frozenset()) -> None:
        self.parameters = parameters
        owned = Parameters((name, parameter) for name, parameter in parameters.named() if parameter not in elsewhere)
        # If this worker updates no parameter, an empty one gives the optimizer the same groups and no state.
        self.optimizer = factory(owned or Parameters([("", nn.Parameter(torch.empty(0)))]))
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must return a torch.optim.Optimizer, not {type(self.optimizer).__name__};"
                " for instance optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4)"
            )
        self.undo = Undo(self.parameters, self.optimizer)

    def groups(self) -> list[dict[str, Any]]:
        """Return the hyperparameters of every group, without its parameters."""
        return hyperparameters(self.optimizer)

    @property
    def kind(self) -> str:
        """Name of the torch optimizer's class."""
        return type(self.optimizer).__name__

    @property
    def group_of(self) -> dict[nn.Parameter, dict[str, Any]]:
        """The group of every parameter that this worker updates."""
        return {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}

    def adopt(self, groups: Sequence[Mapping[str, Any]], state: Mapping[nn.Parameter, dict[str, Any]]) -> None:
        """Replace hyperparameters and state by those of another optimizer of the same class."""
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(saved)
        for parameter, entries in state.items():
            self.optimizer.state.pop(parameter, None)
            if entries:
                self.optimizer.state[parameter] = entries
        self.undo.invalidate()

    def step(self, gradients: Mapping[torch.Tensor, torch.Tensor], changes: Sequence[Mapping[str, Any]]) -> None:
        """Apply ``gradients`` as ``apply`` does; if that raises, restore parameters and state and raise the error."""
        self.undo.refresh()
        try:
            self.apply(gradients, changes)
        except BaseException:
            self.undo.restore()
            raise

    def apply(self, gradients: Mapping[torch.Tensor, torch.Tensor], changes: Sequence[Mapping[str, Any]]) -> None:
        """Update the parameters with ``gradients`` and clear ``.grad``, also on an error.

        ``changes`` holds per group the hyperparameters that the driver has set.
        """
        for group, changed in zip(self.optimizer.param_groups, changes, strict=True):
            group.update(changed)
        for parameter in self.parameters:
            parameter.grad = gradients.get(parameter)
        try:
            self.optimizer.step()
        finally:
            for parameter in self.parameters:
                parameter.grad = None


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the optimizer's ``param_groups`` without the parameters and their names."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
