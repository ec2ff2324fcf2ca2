"""Roll back a failed step: its updates, and the changes of its forwards to buffers.

A step must change no weight unless every stage has applied its update, but an optimizer may raise after
others have succeeded. The only general way to restore the weights is a copy of the parameters and the
optimizer's state. The copy is made parameter by parameter while the worker waits for input, so that it
uses the pipeline's bubble and adds no time. The guarantee costs memory: parameters and optimizer state
are held twice. Where there is no room for that, an ``Undo`` of no parameters still knows how far an update has got.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import nn

from rpcpipe.model import rng
from rpcpipe.stage.attributes import Attributes
from rpcpipe.stage.hyperparameters import Groups, copied, entries, replace


class Watch(Protocol):
    """Is told of an ``Undo``'s copies."""

    def complete(self) -> None:
        """All copies equal the live values: an update may begin once this returns."""
        ...

    def room_for(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return memory for a copy of ``tensor``; None: there is none but the heap."""
        ...

    def stale(self) -> None:
        """The copies are overwritten once this returns: nothing is taken back to them any more."""
        ...

    def ended(self, step: int) -> None:
        """The update of ``step`` has ended on this worker."""
        ...


class Reach(StrEnum):
    """How far a worker has got with an update."""

    BEFORE = "before"
    WITHIN = "within"
    AFTER = "after"


# By parameter: its value and the optimizer's state.
Copies = dict[nn.Parameter, tuple[torch.Tensor, dict[str, Any]]]


class Undo:
    """A copy of ``parameters``, of their ``optimizer.state``, kept up to date by ``refresh_one``, and of ``entries``.

    Invariants: the copies of parameters that are not in ``_stale`` equal the live values, until an update. Groups are
    copied last, by ``refresh``; from then on, ``complete``, the update of ``step`` is taken back to the copies.
    ``moved``: since it was last unset, copies were put elsewhere, or are no tensors. ``ended_step``: the step whose
    update has ended last.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.parameters = list(parameters)
        self._optimizer = optimizer
        self._stale = list(self.parameters)
        self.ended_step: int | None = None
        self._outdated = False
        self.copies: Copies = {}
        self.groups: Groups | None = None
        self.step: int | None = None
        self.complete = self.moved = False
        self.watch: Watch | None = None

    def begin(self, step: int, *, after: int | None = None) -> None:
        """Make new copies from now on, to take back the update of ``step``; the step before is settled.

        ``after``: a step that has updated nothing; if the copies are its own, they are still right.
        """
        if self._outdated or self.step not in (step, after):
            self.invalidate()
        self.step = step

    def cover(self, parameters: Sequence[nn.Parameter]) -> None:
        """Copy ``parameters`` from now on, and no others; nothing is taken back to what was copied before."""
        if len(self.parameters) != len(parameters):
            self.parameters, self.moved = list(parameters), True
            self.invalidate()
            kept = set(self.parameters)
            self.copies = {parameter: copies for parameter, copies in self.copies.items() if parameter in kept}

    def invalidate(self) -> None:
        """Mark all copies as stale, because the live values have changed."""
        if self.watch is not None:
            self.watch.stale()
        self._stale = list(self.parameters)
        self.groups = None
        self.complete = self._outdated = False

    def take_over(self, step: int | None, copies: Copies, groups: Groups | None) -> None:
        """Go on with complete copies, which another has made before an update of ``step``."""
        self.step, self.copies, self.groups, self._stale = step, copies, groups, []
        self.complete = self._outdated = True

    def note_change(self) -> None:
        """Note that the live values have changed, other than by an update."""
        if self.complete:
            self._outdated = True  # the update before may still be taken back, and the change with it
        else:
            self.invalidate()

    def refresh_one(self) -> bool:
        """Copy one stale parameter and its state; return False if no copy is stale."""
        if not self._stale:
            return False
        parameter = self._stale[-1]
        old_value, old_state = self.copies.get(parameter, (None, {}))
        live = self._optimizer.state.get(parameter, {})
        value = self._copied(parameter.detach(), old_value)
        state = {key: self._copied(entry, old_state.get(key)) for key, entry in live.items()}
        self.copies[parameter] = value, state
        if value is not old_value or not _same_tensors(state, old_state):
            self.moved = True
        self._stale.pop()
        return True

    def _copied(self, value: Any, old: Any) -> Any:
        """Return a copy of ``value``, in the memory of ``old`` or, if there is none, where copies are kept."""
        if old is None and self.watch is not None and isinstance(value, torch.Tensor):
            old = self.watch.room_for(value)
        return _copy(value, old)

    def refresh(self) -> None:
        """Copy all stale parameters and their state, and the groups' entries."""
        while self.refresh_one():
            pass
        if self.groups is None:
            self.groups = copied(entries(self._optimizer))
        self.complete = True
        if self.watch is not None:
            self.watch.complete()

    def end(self) -> None:
        """Note that the update of ``step`` has ended."""
        self.ended_step = self.step
        if self.watch is not None and self.step is not None:
            self.watch.ended(self.step)

    def reach(self, step: int) -> Reach:
        """Return how far the update of ``step``, the last one of all, has got."""
        if self.ended_step == step:
            return Reach.AFTER
        return Reach.WITHIN if self.step == step and self.complete else Reach.BEFORE

    def take_back(self, step: int) -> None:
        """Restore what was before the update of ``step``; do nothing if the copies are another step's."""
        if step == self.step:
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the saved values back into the live parameters, the optimizer's state and its groups.

        Stale copies are skipped: every update is preceded by ``refresh``, so a copy is stale only if no
        update has run since ``invalidate``, and then the live values are correct.
        """
        if self.groups is not None:
            replace(self._optimizer, self.groups)
        stale = set(self._stale)
        for parameter, (value, state) in self.copies.items():
            if parameter in stale:
                continue
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
        # By module and name: the tensor, and the copy of its value.
        self.copies: dict[tuple[nn.Module, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, modules: Iterable[nn.Module]) -> None:
        """Copy the buffers of ``modules``, reusing the memory of the previous copies."""
        live = {
            (owner, name): buffer
            for module in modules
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        }
        previous = self.copies
        self.copies = {key: (buffer, _copy(buffer, previous.get(key, (None, None))[1])) for key, buffer in live.items()}

    def restore(self) -> None:
        """Set every buffer back to its tensor and value at the beginning of the step."""
        for (owner, name), (buffer, value) in self.copies.items():
            owner._buffers[name] = buffer
            buffer.data.copy_(value)


class StepStarts:
    """What forwards change, as it was when the newest steps began: one step, or two while one runs ahead.

    A step that runs ahead is taken back without a failure, so it must leave no trace in attributes and generators of
    Python's either, which a failed step leaves as they are. ``buffers``: by step; ``others``: of the step ahead.
    """

    def __init__(self) -> None:
        self.buffers: dict[int, Buffers] = {}
        self.others: tuple[int, Attributes, rng.PythonState] | None = None

    def take(self, step: int, modules: Sequence[nn.Module]) -> None:
        """Copy the buffers of ``modules`` at the beginning of ``step``; drop what is known of others."""
        self._take(step, modules, kept=0)
        self.others = None

    def take_ahead(self, step: int, modules: Sequence[nn.Module], parts: Sequence[Any]) -> None:
        """Copy what ``step`` may change, which runs ahead; keep the copies of the step before.

        ``parts``: modules and other objects of the user's that forwards may change.
        """
        self._take(step, modules, kept=1)
        self.others = step, Attributes(parts), rng.python_state()

    def _take(self, step: int, modules: Sequence[nn.Module], kept: int) -> None:
        unused = None
        while len(self.buffers) > kept:
            unused = self.buffers.pop(min(self.buffers))
        self.buffers[step] = unused or Buffers()
        self.buffers[step].take(modules)

    def check(self, step: int) -> None:
        """Raise ModelError if ``step`` runs ahead and has changed what cannot be put back."""
        if self.others is not None and self.others[0] == step:
            self.others[1].check("which cannot be undone for a step that runs ahead", "train with ahead=0")

    def restore(self, step: int, *, ahead: bool) -> bool:
        """Restore what ``step`` has changed; return False if the step has not begun.

        ``ahead``: what its forwards have changed beside buffers, too.
        """
        if step not in self.buffers:
            return False
        self.buffers[step].restore()
        if ahead and self.others is not None and self.others[0] == step:
            _, attributes, random = self.others
            attributes.put()
            rng.set_python_state(random)
        return True


def _same_tensors(state: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Return whether ``state`` holds nothing but the tensors of ``before``."""
    return state.keys() == before.keys() and all(
        isinstance(entry, torch.Tensor) and entry is before[key] for key, entry in state.items()
    )


def _copy(value: Any, buffer: Any) -> Any:
    """Return a copy of ``value``, in the memory of ``buffer`` if that is a tensor of the same shape and dtype."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    if isinstance(buffer, torch.Tensor) and buffer.shape == value.shape and buffer.dtype == value.dtype:
        return buffer.copy_(value)
    return value.detach().clone()
