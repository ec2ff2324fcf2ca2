"""The optimizer on the driver, in front of the workers' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ArgumentError
from rpcpipe.stage.optimizer import hyperparameters


class PipelineOptimizer(torch.optim.Optimizer):
    """What ``pipe.optimizer`` is: the workers' param_groups, to be read and set on the driver.

    Learning-rate schedulers and ``param_groups[i]["lr"] = …`` work as on any torch optimizer; a
    changed value reaches all workers with the next step. Its parameters are empty stand-ins.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], apply: Callable[[], None], forget: Callable[[], None]
    ) -> None:
        stand_ins = [{**group, "params": [nn.Parameter(torch.empty(0))]} for group in groups]
        super().__init__(stand_ins, dict(groups[0]) if groups else {})
        self._apply = apply
        self._forget = forget
        self._initial = hyperparameters(self)

    @property
    def lr(self) -> tuple[float, ...]:
        """The learning rate of every group; 0 for an optimizer that has none."""
        return tuple(float(group.get("lr", 0.0)) for group in self.param_groups)

    def changes(self) -> list[dict[str, Any]]:
        """Per group, the hyperparameters that are no longer what the factory gave."""
        current = hyperparameters(self)
        # A scheduler may add keys (initial_lr) and a value may have come back to its first one
        # after another was sent, so every key that ever differed goes on being sent.
        for initial, now in zip(self._initial, current, strict=True):
            for key in [key for key in initial if initial[key] != now[key]]:
                del initial[key]
        return [
            {key: value for key, value in now.items() if key not in initial}
            for initial, now in zip(self._initial, current, strict=True)
        ]

    def adopt(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over ``groups``, which the workers have as well."""
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)
        self._initial = hyperparameters(self)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients of the open step on all workers: what ``s.optimize()`` does."""
        if closure is not None:
            raise ArgumentError(
                "a pipeline's optimizer takes no closure: its gradients come from train_step or pipe.step()"
            )
        self._apply()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that calls of ``train_step`` have accumulated since the last update."""
        self._forget()
