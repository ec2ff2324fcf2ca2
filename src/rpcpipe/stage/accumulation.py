"""Gradient accumulation: several calls of ``train_step`` make one update.

Between two calls the gradients stay on the workers, each worker's own. A call adds to a copy of what
the calls before gave, so one that fails drops its own contribution and may be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class AccumulatedGradients:
    """One worker's gradients that await their update, by the step that added to them last.

    Invariant: what is kept does not change. A step whose end the driver has not seen may have left
    its sums here as well; the driver names the step from which the next one goes on.
    """

    def __init__(self) -> None:
        self._sums: dict[int, dict[nn.Parameter, torch.Tensor]] = {}

    def resume(self, after: int | None, parameters: Iterable[nn.Parameter]) -> None:
        """Let ``.grad`` be what it was after step ``after``, nothing for None; the rest is forgotten."""
        kept = {} if after is None else self._sums[after]
        kept = {parameter: kept[parameter] for parameter in parameters if parameter in kept}
        self._sums = {} if after is None else {after: kept}
        for parameter, gradient in kept.items():
            parameter.grad = gradient.clone()

    def keep(self, step: int, parameters: Iterable[nn.Parameter]) -> None:
        """Take the gradients after ``step`` out of ``.grad``."""
        self._sums[step] = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        for parameter in self._sums[step]:
            parameter.grad = None

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Another worker keeps what there is for ``parameters``."""
        for sums in self._sums.values():
            for parameter in parameters:
                sums.pop(parameter, None)

    def of(self, module: nn.Module) -> dict[int, dict[str, torch.Tensor]]:
        """The module's part, by step and the parameter's name, for another worker's ``take``."""
        named = dict(module.named_parameters())
        return {
            step: {name: sums[parameter] for name, parameter in named.items() if parameter in sums}
            for step, sums in self._sums.items()
        }

    def take(self, module: nn.Module, given: dict[int, dict[str, torch.Tensor]]) -> None:
        """Keep what another worker had for ``module``."""
        for step, sums in given.items():
            kept = self._sums.setdefault(step, {})
            kept |= {module.get_parameter(name): gradient for name, gradient in sums.items()}
