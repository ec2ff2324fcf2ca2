"""Versions of one stage's weights, for schedules that update while micro-batches are in flight.

Forward and backward run on aliases: leaf tensors that share a version's memory and have separate
gradients. The module's parameters, which the optimizer updates in place, are always the newest version.
If the next update would overwrite a version that is still needed, the parameters are first moved to a
copy. The aliases keep the old memory until the last backward that uses them.

Invariant: an alias of an older version shares no memory with a parameter. The exception is a policy
that stashes nothing ("latest"): every alias then shares a parameter's memory, and a backward may use newer
weights than its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from rpcpipe.errors import ScheduleError, require
from rpcpipe.schedules.weight_versions import Policy
from rpcpipe.stage.gradients import hooks_of

Aliases = dict[nn.Parameter, torch.Tensor]


R = TypeVar("R")


class _Block(nn.Module):
    """Calls a function, so that ``functional_call`` substitutes ``module``'s parameters meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class Versions:
    """Versions of the weights of stage ``stage`` of ``stages``; ``policy`` determines which.

    Raises ScheduleError for a parameter with hooks that cannot run on an alias. ``newest`` is the number of the
    newest version, ``peak`` the largest number of versions in memory.
    """

    def __init__(self, policy: Policy, stage: int, stages: int, module: nn.Module) -> None:
        _check_hooks(module)
        self.newest = 0
        self.peak = 1
        self._policy, self._stage, self._stages = policy, stage, stages
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._held: dict[int, Aliases] = {}

    @property
    def bytes(self) -> int:
        """Bytes of one version."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._parameters)

    def of(self, group: int) -> int:
        """Return the number of the version with which ``group`` is computed; that version must exist."""
        if not self._policy.stashes:
            return self.newest
        number = self._policy.version(group, self._stage, self._stages)
        assert number <= self.newest, f"group {group} wants version {number} after {self.newest} updates"
        return number

    def call(self, layer: nn.Module, number: int, *arguments: Any) -> Any:
        """Return ``layer(*arguments)``, computed with the weights of version ``number``."""
        named = self._named(layer, number)
        return functional_call(layer, named, arguments) if named else layer(*arguments)

    def run(self, module: nn.Module, number: int, function: Callable[[], R]) -> R:
        """Return ``function()``, during which ``module`` has the weights of version ``number``.

        For a backward that runs layers again.
        """
        block = _Block(module)
        result: R = functional_call(block, self._named(block, number), (function,))
        return result

    def _named(self, module: nn.Module, number: int) -> dict[str, torch.Tensor]:
        """Return the aliases of version ``number`` by the names of ``module``'s parameters."""
        aliases = self._aliases(number)
        return {
            name: aliases[parameter]
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if parameter in aliases
        }

    @property
    def leaves(self) -> set[torch.Tensor]:
        """All versions of the parameters that the stage trains, as the leaves of its graphs."""
        return {alias for aliases in self._held.values() for alias in aliases.values()}

    def collect(self, number: int) -> None:
        """Move the gradients of version ``number`` to the parameters' ``.grad``."""
        for parameter, alias in self._aliases(number).items():
            if parameter.grad is not None:
                raise ScheduleError(
                    f"a parameter of shape {tuple(parameter.shape)} was used past the version of its weights that the"
                    " micro-batch began with (its layer keeps it in a list, or recomputes in the backward with a"
                    " reference of its own); use a synchronous schedule"
                )
            parameter.grad, alias.grad = alias.grad, None

    def before_update(self, group: int, *, skipped: bool = False) -> None:
        """Stash the newest version if ``group + 1`` needs it; called before ``group``'s update.

        The parameters move to a copy, unless the update is ``skipped`` and overwrites nothing.
        """
        if not self._policy.stashes or self._policy.version(group + 1, self._stage, self._stages) > self.newest:
            return
        self._aliases(self.newest)
        for parameter in () if skipped else self._parameters:
            parameter.data = parameter.data.clone()

    def after_update(self, group: int) -> None:
        """Count a new version after ``group``'s update, applied or skipped, and drop versions no longer needed."""
        self.newest += 1
        if not self._policy.stashes:
            return
        needed = self._policy.version(group + 1, self._stage, self._stages)
        self._held = {number: held for number, held in self._held.items() if number >= needed}
        self.peak = max(self.peak, len(self._held.keys() | {self.newest}))

    def _aliases(self, number: int) -> Aliases:
        """Return the aliases of version ``number``, which must be the newest or stashed.

        ``.data`` shares the parameter's memory, but not its autograd version counter.
        """
        number = number if self._policy.stashes else 0
        if number not in self._held:
            assert number in (0, self.newest)
            self._held[number] = {parameter: _alias(parameter) for parameter in self._parameters}
        return self._held[number]


def _alias(parameter: nn.Parameter) -> torch.Tensor:
    alias = parameter.data.requires_grad_()
    alias._backward_hooks, _ = hooks_of(parameter)
    return alias


def _check_hooks(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        _, after = hooks_of(parameter)
        require(
            not after,
            f"parameter {name!r} has a hook of register_post_accumulate_grad_hook, which would be given the newest"
            " weights and another version's gradient under an asynchronous schedule; use register_hook, or a"
            " synchronous schedule, for instance '1f1b'",
            error=ScheduleError,
        )
