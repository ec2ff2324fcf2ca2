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

from rpcpipe.model import rng
from rpcpipe.stage.attributes import Attributes
from rpcpipe.stage.hyperparameters import Groups, copied, entries, replace


class Undo:
    """A copy of ``parameters``, of ``optimizer.state``, kept up to date by ``refresh_one``, and of its ``entries``.

    Invariants: the copies of parameters that are not in ``_stale`` equal the live values, until an update. Groups are
    copied last, by ``refresh``; from then on, ``_complete``, the copies are what an update is taken back to.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._copies: dict[nn.Parameter, tuple[torch.Tensor, dict[str, Any]]] = {}
        self._stale = list(self._parameters)
        self._groups: Groups | None = None
        self._step: int | None = None
        self._complete = self._outdated = False

    def begin(self, step: int, *, after: int | None = None) -> None:
        """Make new copies from now on, to take back the update of ``step``; the step before is settled.

        ``after``: a step that has updated nothing; if the copies are its own, they are still right.
        """
        if self._outdated or self._step not in (step, after):
            self.invalidate()
        self._step = step

    def invalidate(self) -> None:
        """Mark all copies as stale, because the live values have changed."""
        self._stale = list(self._parameters)
        self._groups = None
        self._complete = self._outdated = False

    def note_change(self) -> None:
        """Note that the live values have changed, other than by an update."""
        if self._complete:
            self._outdated = True  # the update before may still be taken back, and the change with it
        else:
            self.invalidate()

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
        self._complete = True

    def take_back(self, step: int) -> None:
        """Restore what was before the update of ``step``; do nothing if the copies are another step's."""
        if step == self._step:
            self.restore()

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


class StepStarts:
    """What forwards change, as it was when the newest steps began: one step, or two while one runs ahead.

    A step that runs ahead is taken back without a failure, so it must leave no trace in attributes and generators of
    Python's either, which a failed step leaves as they are.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Buffers] = {}
        self._others: tuple[int, Attributes, rng.PythonState] | None = None

    def take(self, step: int, modules: Sequence[nn.Module]) -> None:
        """Copy the buffers of ``modules`` at the beginning of ``step``; drop what is known of others."""
        self._take(step, modules, kept=0)
        self._others = None

    def take_ahead(self, step: int, modules: Sequence[nn.Module], parts: Sequence[Any]) -> None:
        """Copy what ``step`` may change, which runs ahead; keep the copies of the step before.

        ``parts``: modules and other objects of the user's that forwards may change.
        """
        self._take(step, modules, kept=1)
        self._others = step, Attributes(parts), rng.python_state()

    def _take(self, step: int, modules: Sequence[nn.Module], kept: int) -> None:
        unused = None
        while len(self._buffers) > kept:
            unused = self._buffers.pop(min(self._buffers))
        self._buffers[step] = unused or Buffers()
        self._buffers[step].take(modules)

    def check(self, step: int) -> None:
        """Raise ModelError if ``step`` runs ahead and has changed what cannot be put back."""
        if self._others is not None and self._others[0] == step:
            self._others[1].check("which cannot be undone for a step that runs ahead", "train with ahead=0")

    def restore(self, step: int, *, ahead: bool) -> bool:
        """Restore what ``step`` has changed; return False if the step has not begun.

        ``ahead``: what its forwards have changed beside buffers, too.
        """
        if step not in self._buffers:
            return False
        self._buffers[step].restore()
        if ahead and self._others is not None and self._others[0] == step:
            _, attributes, random = self._others
            attributes.put()
            rng.set_python_state(random)
        return True


def _copy(value: Any, buffer: Any) -> Any:
    """Return a copy of ``value``, in the memory of ``buffer`` if that is a tensor of the same shape and dtype."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    if isinstance(buffer, torch.Tensor) and buffer.shape == value.shape and buffer.dtype == value.dtype:
        return buffer.copy_(value)
    return value.detach().clone()
