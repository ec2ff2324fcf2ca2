"""What a worker keeps of a pipeline in memory that outlives it, and how a successor goes on from there.

Weights, buffers, the optimizer's state and all copies for rollbacks lie in the memory, where they change in place. What
is no tensor is in pickled records that refer to them, written where something of it has changed, before the driver is
told of what has changed it. A successor makes of them the objects that the dead worker had, so that a ``RollBackStep``
does there what it does on the workers that live on. What makes that so at any instant:

- Buffers at the begin of a step: the copies are complete before a word, ``START`` or ``OTHER_START``, names the step.
- The copies for an update: complete, with their records, before ``UPDATING`` names the step, and then only does the
  update begin. They are overwritten only after ``UPDATING`` is unset, which a next step does. Copies half way are not
  needed: no update has begun then, and the live values count.
- Values that an update has half written: the driver has not been told that it is done, and takes it back.
- A stream goes on from a snapshot on all workers; a dead worker's are recorded before it tells of the update.
- Several records that belong together change by one word.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ModelError, StateError, require
from rpcpipe.stage.attributes import Attributes
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.hyperparameters import entries
from rpcpipe.stage.kept_memory import Condition, KeptMemory, Record, Word
from rpcpipe.stage.rollback import Buffers, StepStarts, Undo
from rpcpipe.stage.stream_rollback import Snapshot, Snapshots
from rpcpipe.worker.kept_records import KeptSnapshot, Model, Part
from rpcpipe.worker.kept_signs import addresses, sign_of, signs, signs_of_state, tensors_in, tensors_of
from rpcpipe.worker.messages import KeptAt
from rpcpipe.worker.operations import (
    ApplyCheckpoint,
    CallModule,
    CommitStep,
    LoadOptimizer,
    LoadState,
    Operation,
    Repartition,
    ReportStep,
    RestoreState,
    RollBackStep,
    SetMetrics,
    SetSelection,
    UndoUpdate,
    UpdateWeights,
)
from rpcpipe.worker.stage_set import StageSet

log = logging.getLogger("rpcpipe.worker")


# Operations that change values in place and are not taken back: a death leaves them half done.
_IN_PLACE = CallModule, LoadState, LoadOptimizer, ApplyCheckpoint, RestoreState
# Others after which anything may be different.
_OTHERS = Repartition, SetMetrics, SetSelection
# Those that end a step or a part of it that the driver is told of.
_OF_STEPS = ReportStep, CommitStep, UpdateWeights, UndoUpdate, RollBackStep
_UPDATES = CommitStep, UpdateWeights
# Records that count while a step can be taken back.
_OF_STEPS_UNDER_WAY = Part.UNDO, Part.UNDO_GROUPS, Part.START, Part.OTHER_START
CHANGING = (*_IN_PLACE, *_OTHERS, *_OF_STEPS)


class KeptState:
    """Keeps ``held`` and ``starts`` in ``memory``. It is the ``Watch`` of the optimizer's ``Undo``.

    ``settle`` follows whatever may have changed something, before its result is sent.
    """

    def __init__(self, memory: KeptMemory, held: StageSet, starts: StepStarts, fresh_loss: dict[str, Any]) -> None:
        held.kept_at = KeptAt(os.getpid(), memory.descriptor)
        self._memory, self._held, self._starts, self._fresh_loss = memory, held, starts, fresh_loss
        self._owners: list[nn.Module] = []
        self._parts: list[Any] = []
        self._slots: list[Buffers | None] = [None, None]
        self._attributes = Attributes([])
        self._signs: dict[Part, Any] = {}  # of what the records say, to see whether that has changed

    @classmethod
    def of(cls, held: StageSet, starts: StepStarts, fresh_loss: dict[str, Any]) -> KeptState | None:
        """Return the kept state of new stages; None, with a line in the log, where there is no memory for it."""
        try:
            memory = KeptMemory.create()
        except (AttributeError, OSError, StateError) as error:
            log.warning("this worker cannot be replaced if it dies: no memory outlives it (%s)", error)
            return None
        kept = cls(memory, held, starts, fresh_loss)
        kept.rewrite()
        return kept

    @contextmanager
    def _or_lost(self) -> Iterator[None]:
        """Go on without the memory where the block cannot keep it right; a later ``rewrite`` may mend that."""
        try:
            yield
        except Exception as error:
            self._memory[Word.CONDITION] = Condition.LOST
            log.warning("this worker cannot be replaced if it dies: %s: %s", type(error).__name__, error)
            log.debug("what could not be kept", exc_info=True)

    @property
    def _is_kept(self) -> bool:
        return self._memory[Word.CONDITION] in (Condition.KEPT, Condition.CHANGING)

    @contextmanager
    def around(self, operation: Operation) -> Iterator[None]:
        """Keep what ``operation``, which the block executes, makes or changes."""
        if isinstance(operation, _IN_PLACE) and self._is_kept:
            self._memory[Word.CONDITION] = Condition.CHANGING
        try:
            yield
        finally:
            if isinstance(operation, (*_IN_PLACE, *_OTHERS)):
                self.rewrite()
            elif isinstance(operation, _OF_STEPS):
                self._settle(operation)

    # --- in the order of a step ---

    def begin(self, plan: StepContext) -> None:
        """``plan``'s step begins: the buffers are copied, and no update has begun."""
        if plan.training and plan.policy is None and self._is_kept:
            with self._or_lost():
                records = dict[Part, Record]()
                self._copied_starts(records)
                self._sums(records)
                self._commit(records)
                self._name_starts()
        self._memory[Word.BEGUN] = plan.step << 1 | plan.training

    def snapshots(self, snapshots: Snapshots) -> None:
        """A stream goes on from one of ``snapshots`` if a worker dies: the live values do not count."""
        if self._memory[Word.CONDITION] == Condition.LOST:
            return
        with self._or_lost():
            numbers = [snapshots.stream, *snapshots.slots]
            if numbers != self._signs.get(Part.SNAPSHOTS):
                taken = {number: self._snapshot(slot) for number, slot in snapshots.slots.items()}
                self._memory[Word.UPDATING] = -1  # the copies for an update are a snapshot now
                if (optimizer := self._held.optimizer) is not None:
                    optimizer.undo.watch = None
                undo = {Part.UNDO: self._memory.dumps(None)}
                self._commit({Part.SNAPSHOTS: self._memory.dumps((snapshots.stream, taken)), **undo})
                self._signs[Part.SNAPSHOTS] = numbers
            self._memory[Word.CONDITION] = Condition.STREAM

    def _snapshot(self, slot: Snapshot) -> KeptSnapshot:
        undo = slot.undo
        self._memory.take_in(tensors_in(slot.past))
        return KeptSnapshot(
            copies=None if undo is None else self._copies(undo),
            groups=None if undo is None else undo.groups,
            buffers=self._places(slot.buffers),
            past=self._placed(slot.past),
        )

    def stream_ended(self) -> None:
        """The live values count again; the snapshots stay."""
        with self._or_lost():
            # What was lost in between has no right snapshots.
            lost = self._memory[Word.CONDITION] == Condition.LOST
            self._write_all({Part.SNAPSHOTS: self._memory.dumps(None)} if lost else {})
            self._memory[Word.CONDITION] = Condition.KEPT

    def snapshots_dropped(self) -> None:
        """The snapshots do not count any more, and their memory may be overwritten."""
        self._memory[Word.UPDATING] = -1
        if self._is_kept:
            with self._or_lost():
                self._commit({Part.SNAPSHOTS: self._memory.dumps(None)})
        if (optimizer := self._held.optimizer) is not None:
            optimizer.undo.watch, optimizer.undo.moved = self, True

    def _copies(self, undo: Undo) -> list[Any]:
        """Return the copies of ``undo``, taken in, in its parameters' order."""
        copies = [list(undo.copies[parameter]) for parameter in undo.parameters]
        self._memory.take_in(tensors_in(copies))
        return list(map(self._placed, copies))

    def complete(self) -> None:
        """The copies are complete: write their records, so that an update may begin."""
        if not self._is_kept or (optimizer := self._held.optimizer) is None:
            return
        with self._or_lost():
            records, undo = dict[Part, Record](), optimizer.undo
            if undo.moved:
                records[Part.UNDO] = self._memory.dumps(self._copies(undo))
                undo.moved = False
            self._write_if_new(records, Part.UNDO_GROUPS, undo.groups)
            self._commit(records)
            self._memory[Word.UPDATING] = -1 if undo.step is None else undo.step

    def room_for(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return memory here for a copy: on the heap there would be both for a while, beside activations."""
        if not self._is_kept or not self._memory.can_hold(tensor):
            return None
        with self._or_lost():
            return self._memory.room_for(tensor)
        return None

    def stale(self) -> None:
        """The copies are about to be overwritten."""
        self._memory[Word.UPDATING] = -1

    def ended(self, step: int) -> None:
        """The update of ``step`` has ended, and what it has changed is brought in."""
        self._memory[Word.UPDATED] = step

    def _settle(self, operation: Operation) -> None:
        """Bring in what a step has made or changed."""
        if self._is_kept:
            with self._or_lost():
                records = dict[Part, Record]()
                # An update changes no layer but its weights, and the end of the backwards nothing of the optimizer.
                self._model(records, whole=not isinstance(operation, _UPDATES))
                if not isinstance(operation, ReportStep):
                    self._optimizer(records)
                self._sums(records)
                self._commit(records)

    # --- between steps ---

    def rewrite(self) -> None:
        """Write everything anew: anything may have changed, and the last step is settled."""
        with self._or_lost():
            self._write_all({Part.SNAPSHOTS: self._memory.dumps(None)})
            self._memory[Word.CONDITION] = Condition.KEPT

    def write_image(self, descriptor: int) -> None:
        """Write what a successor on another host needs between two steps into a file.

        Raises ModelError if not all of it is kept.
        """
        require(
            self._memory[Word.CONDITION] == Condition.KEPT,
            "not all of the stages' state is kept: the worker's log says what",
            error=ModelError,
        )
        self._memory.write_image(descriptor, _OF_STEPS_UNDER_WAY)

    def resume(self) -> None:
        """Go on in a dead worker's memory, with what has been restored from it."""
        self._write_all({})
        if self._memory[Word.CONDITION] == Condition.CHANGING:
            self._memory[Word.CONDITION] = Condition.KEPT

    def _write_all(self, records: dict[Part, Record]) -> None:
        self._owners = [owner for module in self._held.buffered for owner in module.modules()]
        self._parts = self._held.parts
        self._signs = {Part.SUMS: object()}  # unlike any, so that all is written
        undo = None if self._held.optimizer is None else self._held.optimizer.undo
        if undo is None or not undo.complete:
            self._memory[Word.UPDATING] = -1
        self._model(records)
        self._optimizer(records)
        self._copied_starts(records)
        self._sums(records)
        self._commit(records)
        self._name_starts()
        if undo is not None:
            undo.watch, undo.moved = self, undo.moved or not undo.complete

    # --- the records ---

    def _commit(self, records: Mapping[Part, Record]) -> None:
        if records:
            self._memory.commit(records)

    def _write_if_new(self, records: dict[Part, Record], part: Part, value: Any) -> None:
        """Write ``part`` unless its bytes are those that were written last."""
        record = self._memory.dumps(value)
        if record.data != self._signs.get(part):
            records[part], self._signs[part] = record, record.data

    def _placed(self, value: Any) -> Any:
        """Return a nest with the places of its tensors, which pickle fast."""
        if isinstance(value, torch.Tensor):
            return self._memory.place(value)
        if type(value) is dict:
            return {key: self._placed(item) for key, item in value.items()}
        return list(map(self._placed, value)) if type(value) is list else value

    def _model(self, records: dict[Part, Record], *, whole: bool = True) -> None:
        """Write the model anew if its tensors lie elsewhere, or, with ``whole``, if it has changed its attributes."""
        live = [tensor for owner in self._owners for tensor in tensors_of(owner)]
        if self._signs.get(Part.MODEL) != addresses(live):
            attributes = Attributes(self._parts)
        elif not whole or (attributes := Attributes(self._parts)).same(self._attributes):
            return
        # Views of them in attributes go along.
        storages = {tensor.untyped_storage().data_ptr() for tensor in live if self._memory.can_hold(tensor)}
        aliases = [
            tensor
            for tensor in attributes.tensors
            if self._memory.can_hold(tensor) and tensor.untyped_storage().data_ptr() in storages
        ]
        self._memory.take_in([*live, *aliases])
        for tensor in live:
            if isinstance(tensor, nn.Parameter) and not self._memory.holds(tensor):
                raise ModelError(f"a parameter is no plain tensor of the CPU: {tuple(tensor.shape)}, {tensor.layout}")
        records[Part.MODEL] = self._memory.dumps(self._skeleton())
        self._signs[Part.MODEL], self._attributes = addresses(live), attributes

    def _skeleton(self) -> Model:
        held = self._held
        held.switch_to_own_modes()
        last, optimizer = held.stages.get(held.last_stage), held.optimizer
        return Model(
            spec=held.current_spec(),
            fresh_loss=self._fresh_loss,
            metrics={} if last is None else last.metrics,
            select=None if last is None else last.select,
            frozen=[] if optimizer is None else [p for p in optimizer.parameters if not p.requires_grad],
            others=self._starts.others,
        )

    def _optimizer(self, records: dict[Part, Record]) -> None:
        if (optimizer := self._held.optimizer) is None:
            return
        state = [optimizer.optimizer.state.get(parameter) for parameter in optimizer.parameters]
        if signs_of_state(state) != self._signs.get(Part.STATE):
            self._memory.take_in(tensors_in(state))
            records[Part.STATE] = self._memory.dumps(self._placed(state))
            self._signs[Part.STATE] = signs_of_state(state)
        self._write_if_new(records, Part.GROUPS, entries(optimizer.optimizer))

    def _sums(self, records: dict[Part, Record]) -> None:
        accumulated = self._held.accumulated
        if not accumulated.sums and Part.SUMS not in self._signs:
            return
        parameters = self._held.parameters if accumulated.sums else []  # to look for them takes a while
        place = {parameter: index for index, parameter in enumerate(parameters)}
        sums = {
            step: {place[parameter]: gradient for parameter, gradient in own.items()}
            for step, own in accumulated.sums.items()
        }
        sign = signs([accumulated.resumed, sums])
        if sign != self._signs.get(Part.SUMS):
            self._memory.take_in(tensors_in(sums))
            records[Part.SUMS] = self._memory.dumps((accumulated.resumed, self._placed(sums)))
            self._signs[Part.SUMS] = signs([accumulated.resumed, sums])

    def _copied_starts(self, records: dict[Part, Record]) -> None:
        """Write where the copies of buffers are, of one step or two, each in a slot of its own."""
        live = list(self._starts.buffers.values())
        self._slots = [slot if any(slot is own for own in live) else None for slot in self._slots]
        for own in live:
            if not any(slot is own for slot in self._slots):
                self._slots[self._slots.index(None)] = own
        for part, slot in zip((Part.START, Part.OTHER_START), self._slots, strict=True):
            if slot is not None:
                self._start(records, part, slot)

    def _start(self, records: dict[Part, Record], part: Part, buffers: Buffers) -> None:
        self._memory.take_in(tensor for pair in buffers.copies.values() for tensor in pair)
        sign = [(*key, *map(sign_of, pair)) for key, pair in buffers.copies.items()]
        if sign != self._signs.get(part):
            records[part], self._signs[part] = self._memory.dumps(self._places(buffers)), sign

    def _places(self, buffers: Buffers) -> list[Any]:
        """Return whose ``buffers`` are, where they lie, and where their copies do, taken in."""
        self._memory.take_in(tensor for pair in buffers.copies.values() for tensor in pair)
        index = {owner: number for number, owner in enumerate(self._owners)}
        return [
            (index[owner], name, *map(self._memory.place, pair))
            for (owner, name), pair in buffers.copies.items()
            if owner in index  # a call may have taken it out
        ]

    def _name_starts(self) -> None:
        for word, slot in zip((Word.START, Word.OTHER_START), self._slots, strict=True):
            steps = [step for step, buffers in self._starts.buffers.items() if buffers is slot]
            self._memory[word] = steps[0] if steps else -1
