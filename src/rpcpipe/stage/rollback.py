"""Takes back what a failed step did: its updates, and what its forwards did to buffers.

A step changes no weight unless all stages could apply it, and an optimizer may raise after others
have succeeded. The only general way back is a copy of the parameters and the optimizer's state.
It is made piece by piece while the worker waits for input, so that it costs the pipeline's bubble
and no time; its memory (parameters + optimizer state once more) is the price of the guarantee.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


class Undo:
    """A copy of ``parameters`` and of ``optimizer.state``, kept up to date by ``copy_one``.

    Invariant: what is in ``_copies`` and not in ``_stale`` equals the live values.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._copies: dict[nn.Parameter, tuple[torch.Tensor, dict[str, Any]]] = {}
        self._stale = list(self._parameters)

    def invalidate(self) -> None:
        """The live values have changed; the copies are to be made again."""
        self._stale = list(self._parameters)

    def refresh_one(self) -> bool:
        """Bring one parameter's copy up to date; False if all are."""
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
        """Bring all copies up to date."""
        while self.refresh_one():
            pass

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back into the live parameters and the optimizer's state.

        A stale copy is left alone: the optimizer has not run since, or ``complete`` would have
        renewed it, so the live values are right.
        """
        fresh = [parameter for parameter in self._copies if parameter not in set(self._stale)]
        for parameter in fresh:
            value, state = self._copies[parameter]
            parameter.copy_(value)
            if state:
                self._optimizer.state[parameter] = {key: _copy(entry, None) for key, entry in state.items()}
            else:
                self._optimizer.state.pop(parameter, None)


class Buffers:
    """A copy of all buffers (BatchNorm's statistics) as they were when a step began.

    A forward may change a buffer in place, also behind autograd's back, or put another tensor in its place.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[nn.Module, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, modules: Iterable[nn.Module]) -> None:
        """Copy the buffers of ``modules``, into the memory of the copies before."""
        live = {
            (owner, name): buffer
            for module in modules
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        }
        before = self._copies
        self._copies = {key: (buffer, _copy(buffer, before.get(key, (None, None))[1])) for key, buffer in live.items()}

    def restore(self) -> None:
        """Put them back."""
        for (owner, name), (buffer, copied) in self._copies.items():
            owner._buffers[name] = buffer
            buffer.data.copy_(copied)


def _copy(value: Any, buffer: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    if isinstance(buffer, torch.Tensor) and buffer.shape == value.shape and buffer.dtype == value.dtype:
        return buffer.copy_(value)
    return value.detach().clone()
