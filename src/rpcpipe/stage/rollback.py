"""Roll back a failed step: its updates, and the changes of its forwards to buffers.

A step must change no weight unless every stage has applied its update, but an optimizer may raise after
others have succeeded. The only general way to restore the weights is a copy of the parameters and the
optimizer's state. The copy is made parameter by parameter while the worker waits for input, so that it
uses the pipeline's bubble and adds no time. The guarantee costs memory: parameters and optimizer state
are held twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rpcpipe.stage.hyperparameters import Groups, copied, entries, replace


class Undo:
    """A copy of ``parameters``, of ``optimizer.state``, kept up to date by ``refresh_one``, and of its ``entries``.

    Invariant: the copies of parameters that are not in ``_stale`` equal the live values, until an update. Groups are
    copied last, by ``refresh``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._copies: dict[nn.Parameter, tuple[torch.Tensor, dict[str, Any]]] = {}
        self._stale = list(self._parameters)
        self._groups: Groups | None = None

    def invalidate(self) -> None:
        """Mark all copies as stale, because the live values have changed."""
        self._stale = list(self._parameters)
        self._groups = None

    def refresh_one(self) -> bool:
        """Copy one stale parameter and its state; return False if no copy is stale."""
        if not self._stale:
            return False
        parameter = self._stale[-1]
        old_value, old_state = self._copies.get(parameter, (None, {}))
        state = self._optimizer.state.get(parameter, {})
        self._copies[parameter] = (
            _copy(parameter.detach(), old_value),
            {key: _copy(value, old_state.get(key)) for key, value in state.items()},
        )
        self._stale.pop()
        return True

    def refresh(self) -> None:
        """Copy all stale parameters and their state, and the groups' entries."""
        while self.refresh_one():
            pass
        if self._groups is None:
            self._groups = copied(entries(self._optimizer))

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the saved values back into the live parameters, the optimizer's state and its groups.

        Stale copies are skipped: every update is preceded by ``refresh``, so a copy is stale only if no
        update has run since ``invalidate``, and then the live values are correct.
        """
        if self._groups is not None:
            replace(self._optimizer, self._groups)
        fresh = [parameter for parameter in self._copies if parameter not in set(self._stale)]
        for parameter in fresh:
            value, state = self._copies[parameter]
            parameter.copy_(value)
            if state:
                self._optimizer.state[parameter] = {key: _copy(entry, None) for key, entry in state.items()}
            else:
                self._optimizer.state.pop(parameter, None)


class Buffers:
    """A copy of all buffers (such as BatchNorm's statistics) at the beginning of a step.

    A forward may change a buffer in place, also without autograd's notice, or replace it by another tensor.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[nn.Module, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, modules: Iterable[nn.Module]) -> None:
        """Copy the buffers of ``modules``, reusing the memory of the previous copies."""
        live = {
            (owner, name): buffer
            for module in modules
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        }
        previous = self._copies
        self._copies = {
            key: (buffer, _copy(buffer, previous.get(key, (None, None))[1])) for key, buffer in live.items()
        }

    def restore(self) -> None:
        """Set every buffer back to its tensor and value at the beginning of the step."""
        for (owner, name), (buffer, value) in self._copies.items():
            owner._buffers[name] = buffer
            buffer.data.copy_(value)


def _copy(value: Any, buffer: Any) -> Any:
    """Return a copy of ``value``, in the memory of ``buffer`` if that is a tensor of the same shape and dtype."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    if isinstance(buffer, torch.Tensor) and buffer.shape == value.shape and buffer.dtype == value.dtype:
        return buffer.copy_(value)
    return value.detach().clone()
