"""Versions of one stage's weights, for schedules that update while micro-batches are in flight.

Forward and backward run on aliases: leaves that share a version's memory and have gradients of
their own. The module's parameters, which the optimizer changes in place, are always the newest
version. Where the next update would overwrite a version still needed, the parameters move to a copy
first and the old memory stays with its aliases, until the last backward that uses them.

Invariant: an alias of a version before the newest shares no memory with a parameter, but under
"latest", where every alias does: there a backward sees weights that its forward did not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from rpcpipe.schedules.weight_versions import version

Aliases = dict[nn.Parameter, torch.Tensor]


class Versions:
    """The weights of stage ``stage`` of ``stages`` under a policy of ``versions.POLICIES``."""

    def __init__(self, policy: str, stage: int, stages: int, module: nn.Module) -> None:
        self.newest = 0
        self.peak = 1
        self._policy, self._stage, self._stages = policy, stage, stages
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._held: dict[int, Aliases] = {}

    @property
    def bytes(self) -> int:
        """Of one version."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._parameters)

    def of(self, group: int) -> int:
        """The version with which ``group`` is computed; it exists."""
        if self._policy == "latest":
            return self.newest
        number = version(self._policy, group, self._stage, self._stages)
        assert number <= self.newest, f"group {group} wants version {number} after {self.newest} updates"
        return number

    def call(self, layer: nn.Module, number: int, *arguments: Any) -> Any:
        """``layer(*arguments)`` with the weights of version ``number``."""
        aliases = self._aliases(number)
        named = {
            name: aliases[parameter]
            for name, parameter in layer.named_parameters(remove_duplicate=False)
            if parameter in aliases
        }
        return functional_call(layer, named, arguments) if named else layer(*arguments)

    def collect(self, number: int) -> None:
        """Move the gradients of version ``number`` to the parameters' ``.grad``."""
        for parameter, alias in self._aliases(number).items():
            parameter.grad, alias.grad = alias.grad, None

    def before_update(self, group: int, *, skipped: bool = False) -> None:
        """The parameters are about to be overwritten by ``group``'s update, unless it is ``skipped``."""
        if self._policy == "latest" or version(self._policy, group + 1, self._stage, self._stages) > self.newest:
            return
        self._aliases(self.newest)
        for parameter in () if skipped else self._parameters:
            parameter.data = parameter.data.clone()

    def after_update(self, group: int) -> None:
        """``group`` is over, whether it changed the weights or was skipped."""
        self.newest += 1
        if self._policy == "latest":
            return
        needed = version(self._policy, group + 1, self._stage, self._stages)
        self._held = {number: held for number, held in self._held.items() if number >= needed}
        self.peak = max(self.peak, len(self._held.keys() | {self.newest}))

    def _aliases(self, number: int) -> Aliases:
        """Of version ``number``, which is the newest or held. ``.data`` shares memory, but no version counter."""
        number = 0 if self._policy == "latest" else number
        if number not in self._held:
            assert number in (0, self.newest)
            self._held[number] = {parameter: parameter.data.requires_grad_() for parameter in self._parameters}
        return self._held[number]
