"""The optimizer on the driver, which stands for the workers' optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ArgumentError
from rpcpipe.stage.optimizer import hyperparameters


class PipelineOptimizer(torch.optim.Optimizer):
    """The type of ``pipe.optimizer``: reads and sets the workers' param_groups on the driver.

    Learning-rate schedulers and ``param_groups[i]["lr"] = …`` work as on any torch optimizer; a changed value
    reaches all workers with the next step. The parameters are empty stand-ins. ``apply`` applies the gradients
    of the active step, ``forget`` drops the accumulated gradients.
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
        """The learning rate of every group; 0 for an optimizer without learning rate."""
        return tuple(float(group.get("lr", 0.0)) for group in self.param_groups)

    def changes(self) -> list[dict[str, Any]]:
        """Return, per group, the hyperparameters that have ever differed from the factory's."""
        current = hyperparameters(self)
        # A value may return to its initial one after another value was sent, so every key that ever differed
        # is sent from then on. A scheduler may also add keys (initial_lr).
        for initial, now in zip(self._initial, current, strict=True):
            for key in [key for key in initial if initial[key] != now[key]]:
                del initial[key]
        return [
            {key: value for key, value in now.items() if key not in initial}
            for initial, now in zip(self._initial, current, strict=True)
        ]

    def adopt(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Set the hyperparameters to ``groups``, which the workers have already."""
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)
        self._initial = hyperparameters(self)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients of the open step on all workers, as ``s.optimize()`` does.

        Raises ArgumentError for a ``closure``.
        """
        if closure is not None:
            raise ArgumentError(
                "a pipeline's optimizer takes no closure: its gradients come from train_step or pipe.step()"
            )
        self._apply()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that calls of ``train_step`` have accumulated since the last update."""
        self._forget()
