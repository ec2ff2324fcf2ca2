"""Versions of one stage's weights, for schedules that update while micro-batches are in flight.

Forward and backward run on aliases: leaf tensors that share a version's memory and have separate
gradients. The module's parameters, which the optimizer updates in place, are always the newest version.
If the next update would overwrite a version that is still needed, the parameters are first moved to a
copy. The aliases keep the old memory until the last backward that uses them.

Invariant: an alias of an older version shares no memory with a parameter. The exception is a policy
that stashes nothing ("latest"): every alias then shares a parameter's memory, and a backward may use newer
weights than its forward. A stream that goes on from a snapshot puts the older weights of a forward into that memory
while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from rpcpipe.errors import ScheduleError, require
from rpcpipe.schedules.weight_versions import Policy
from rpcpipe.stage import stream_rollback
from rpcpipe.stage.context import MicroBatch
from rpcpipe.stage.gradients import hooks_of
from rpcpipe.stage.stream_rollback import Past

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
    newest version, ``peak`` the largest number of versions in memory. ``past``: the versions before the newest, in a
    stream that goes on from a snapshot. With ``remembers`` it may have to go on from one.
    """

    def __init__(
        self,
        policy: Policy,
        stage: int,
        stages: int,
        module: nn.Module,
        *,
        newest: int = 0,
        past: Past | None = None,
        remembers: bool = False,
    ) -> None:
        _check_hooks(module)
        self.newest = newest
        self.peak = 1
        self._policy, self._stage, self._stages = policy, stage, stages
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._held: dict[int, Aliases] = {}
        self._remembers = remembers
        self._past: Past = {}  # of a policy that stashes nothing: what a snapshot needs, or a stream that goes on
        if policy.stashes:
            for number, values in (past or {}).items():
                pairs = zip(self._parameters, values, strict=True)
                self._held[number] = {parameter: _alias(parameter, value) for parameter, value in pairs}
        else:
            self._past = dict(past or {})

    @property
    def bytes(self) -> int:
        """Bytes of one version."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._parameters)

    def of(self, group: int) -> int:
        """Return the number of the version with which ``group`` is computed; that version must exist."""
        if not self._policy.stashes:
            return self.newest
        number = self._wanted(group)
        assert number <= self.newest, f"group {group} wants version {number} after {self.newest} updates"
        return number

    def _wanted(self, group: int) -> int:
        return self._policy.version(group, self._stage, self._stages)

    @property
    def past(self) -> Past:
        """Copies of the versions before the newest that groups still use whose update has not come."""
        if not self._policy.stashes:
            return dict(self._past)
        return {
            number: [aliases[parameter].detach().clone() for parameter in self._parameters]
            for number, aliases in self._held.items()
            if number < self.newest
        }

    @contextmanager
    def forwarding(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Run a forward in the block: one that has run before, when there were fewer updates, uses their weights."""
        group = micro_batch.group
        values = self._past.get(self._wanted(group)) if self._past and group is not None else None
        if values is None:
            yield
            return
        # By .data, as an optimizer's update: no alias counts a change.
        live = [parameter.data for parameter in self._parameters]
        newest = [value.clone() for value in live]
        _copy_all(live, values)
        try:
            yield
        finally:
            _copy_all(live, newest)

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
        """Drop versions no longer needed, and stash the newest if ``group + 1`` needs it; before ``group``'s update.

        The parameters move to a copy, unless the update is ``skipped`` and overwrites nothing.
        """
        if not self._policy.stashes:
            if self._remembers and self._wanted(stream_rollback.following(self.newest)) <= self.newest:
                self._past[self.newest] = [parameter.detach().clone() for parameter in self._parameters]
            return
        # Their last backward is done: gone before there is another version.
        needed = self._wanted(group + 1)
        self._held = {number: held for number, held in self._held.items() if number >= needed}
        if needed > self.newest:
            return
        self._aliases(self.newest)
        for parameter in () if skipped else self._parameters:
            parameter.data = parameter.data.clone()

    def after_update(self, group: int) -> None:
        """Count a new version after ``group``'s update, applied or skipped."""
        self.newest += 1
        if not self._policy.stashes:
            needed = self._wanted(group + 1)
            self._past = {number: values for number, values in self._past.items() if number >= needed}
            return
        self.peak = max(self.peak, len(self._held.keys() | {self.newest}))

    def _aliases(self, number: int) -> Aliases:
        """Return the aliases of version ``number``, which must be the newest or stashed.

        ``.data`` shares the parameter's memory, but not its autograd version counter.
        """
        number = number if self._policy.stashes else 0
        if number not in self._held:
            assert number in (0, self.newest)
            self._held[number] = {parameter: _alias(parameter, parameter.data) for parameter in self._parameters}
        return self._held[number]


def _alias(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """Return a leaf in the memory of ``value``, which is a version of ``parameter``."""
    alias = value.detach().requires_grad_()
    alias._backward_hooks, _ = hooks_of(parameter)
    return alias


def _copy_all(targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


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
