"""Gradient accumulation: one update after several calls of ``train_step``.

Between two calls every worker keeps its gradients. A call adds to a copy of the earlier calls' gradients,
so a call that fails drops only its contribution and may be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
from torch import nn


class AccumulatedGradients:
    """One worker's gradients that wait for their update, by the last step that added to them.

    Invariant: stored gradients are never modified in place. A step whose end did not reach the driver may
    also have stored its sums; therefore the driver names the step from which the next one continues.
    """

    def __init__(self) -> None:
        self.sums: dict[int, dict[nn.Parameter, torch.Tensor]] = {}
        self.resumed: int | None = None

    def resume(self, after: int | None, parameters: Iterable[nn.Parameter], *, ahead: bool = False) -> None:
        """Set ``.grad`` to the gradients stored after step ``after`` (None: leave it) and drop all others.

        ``ahead``: the step before is not settled, so what it has resumed from is kept, too.
        """
        kept = {} if after is None else self.sums[after]
        kept = {parameter: kept[parameter] for parameter in parameters if parameter in kept}
        before = {step: sums for step, sums in self.sums.items() if ahead and step == self.resumed}
        self.sums = before if after is None else before | {after: kept}
        self.resumed = after
        for parameter, gradient in kept.items():
            parameter.grad = gradient.clone()

    def keep(self, step: int, parameters: Iterable[nn.Parameter]) -> None:
        """Move the gradients from ``.grad`` to the store, under ``step``."""
        self.sums[step] = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        for parameter in self.sums[step]:
            parameter.grad = None

    def retain(self, parameters: Set[nn.Parameter]) -> None:
        """Drop the stored gradients of all but ``parameters``: others have left, or another worker keeps theirs."""
        self.sums = {
            step: {parameter: gradient for parameter, gradient in sums.items() if parameter in parameters}
            for step, sums in self.sums.items()
        }

    def of(self, module: nn.Module) -> dict[int, dict[str, torch.Tensor]]:
        """Return the stored gradients of ``module`` by step and parameter name, for ``take`` on another worker."""
        named = dict(module.named_parameters())
        return {
            step: {name: sums[parameter] for name, parameter in named.items() if parameter in sums}
            for step, sums in self.sums.items()
        }

    def take(self, module: nn.Module, received: dict[int, dict[str, torch.Tensor]]) -> None:
        """Store the gradients ``received`` for ``module``, which ``of`` has returned on another worker."""
        for step, sums in received.items():
            kept = self.sums.setdefault(step, {})
            kept |= {module.get_parameter(name): gradient for name, gradient in sums.items()}
