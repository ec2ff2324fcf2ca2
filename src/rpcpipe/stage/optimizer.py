"""The distributed optimizer: one torch optimizer per worker, one in front of them on the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from rpcpipe.stage.rollback import Undo


class Parameters(list[nn.Parameter]):
    """What the user's factory gets: a worker's trainable parameters, in the model's order."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)
        super().__init__(parameter for _, parameter in self._named)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """(name in the unsplit model's ``state_dict``, parameter) for each."""
        return list(self._named)


Factory = Callable[[Parameters], torch.optim.Optimizer]


class LocalOptimizer:
    """A worker's share: the user's optimizer over the parameters of its stages.

    Those ``elsewhere`` are updated on other workers and only taken back here.
    """

    def __init__(self, factory: Factory, parameters: Parameters, elsewhere: Set[nn.Parameter] = frozenset()) -> None:
        self.parameters = parameters
        mine = Parameters((name, parameter) for name, parameter in parameters.named() if parameter not in elsewhere)
        # Where nothing is updated here, a stand-in makes the same groups and leaves no state.
        self.optimizer = factory(mine or Parameters([("", nn.Parameter(torch.empty(0)))]))
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must return a torch.optim.Optimizer, not {type(self.optimizer).__name__};"
                " for instance optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4)"
            )
        self.undo = Undo(self.parameters, self.optimizer)

    def groups(self) -> list[dict[str, Any]]:
        """The hyperparameters of every group, without its parameters."""
        return hyperparameters(self.optimizer)

    @property
    def kind(self) -> str:
        """The torch optimizer's class."""
        return type(self.optimizer).__name__

    @property
    def group_of(self) -> dict[nn.Parameter, dict[str, Any]]:
        """By parameter that is updated here, its group."""
        return {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}

    def adopt(self, groups: Sequence[Mapping[str, Any]], state: Mapping[nn.Parameter, dict[str, Any]]) -> None:
        """Go on from hyperparameters and state that another optimizer of this kind had."""
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(saved)
        for parameter, entries in state.items():
            self.optimizer.state.pop(parameter, None)
            if entries:
                self.optimizer.state[parameter] = entries
        self.undo.invalidate()

    def step(self, gradients: Mapping[torch.Tensor, torch.Tensor], changes: Sequence[Mapping[str, Any]]) -> None:
        """``apply``, or if that raises, nothing."""
        self.undo.refresh()
        try:
            self.apply(gradients, changes)
        except BaseException:
            self.undo.restore()
            raise

    def apply(self, gradients: Mapping[torch.Tensor, torch.Tensor], changes: Sequence[Mapping[str, Any]]) -> None:
        """Apply ``gradients``; ``changes`` holds per group the hyperparameters the driver has set."""
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
    """``param_groups`` without the parameters and their names."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
