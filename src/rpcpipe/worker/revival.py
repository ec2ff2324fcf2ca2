"""Make a dead worker's objects of the memory that it has left; ``kept_state`` says what that holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rpcpipe.errors import ModelError, require
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.hyperparameters import replace
from rpcpipe.stage.kept_memory import Condition, KeptMemory, Word
from rpcpipe.stage.optimizer import LocalOptimizer
from rpcpipe.stage.rollback import Buffers, Copies, StepStarts, Undo
from rpcpipe.stage.stream_rollback import Snapshot, Snapshots
from rpcpipe.worker.kept_records import KeptSnapshot, Model, Part
from rpcpipe.worker.kept_state import KeptState
from rpcpipe.worker.stage_set import StageSet


@dataclass(kw_only=True)
class Restored:
    """What a successor goes on with."""

    held: StageSet
    starts: StepStarts
    fresh_loss: dict[str, Any]
    plan: StepContext
    snapshots: Snapshots | None
    kept: KeptState


def restore(memory: KeptMemory, device: torch.device) -> Restored:
    """Return what the worker had whose ``memory`` it is; raises ModelError if it kept nothing that could go on."""
    condition = Condition(memory[Word.CONDITION])
    require(
        condition is not Condition.LOST,
        "the dead worker's state cannot be taken over: its log says what could not be kept",
        error=ModelError,
    )
    records = memory.load()
    model: Model = records[Part.MODEL]
    held = _stages(model, device)
    step, training = memory[Word.BEGUN] >> 1, bool(memory[Word.BEGUN] & 1)
    if held.optimizer is not None:
        _fill(held.optimizer, records, memory[Word.UPDATING])
        held.optimizer.undo.ended_step = memory[Word.UPDATED]
    snapshots = _snapshots(held, records[Part.SNAPSHOTS], ended=condition is not Condition.STREAM)
    parameters = held.parameters
    held.accumulated.resumed, sums = records[Part.SUMS]
    held.accumulated.sums = {
        number: {parameters[index]: gradient for index, gradient in own.items()} for number, own in sums.items()
    }
    starts = StepStarts()
    starts.others = model.others
    for word, part in sorted([(memory[Word.START], Part.START), (memory[Word.OTHER_START], Part.OTHER_START)]):
        if word >= 0:
            starts.buffers[word] = _buffers(held, records[part])
    kept = KeptState(memory, held, starts, model.fresh_loss)
    kept.resume()
    plan = StepContext(step, 0, training, ())
    return Restored(
        held=held, starts=starts, fresh_loss=model.fresh_loss, plan=plan, snapshots=snapshots, kept=kept
    )  # fmt: skip


def _stages(model: Model, device: torch.device) -> StageSet:
    for parameter in model.frozen:
        parameter.requires_grad_(True)  # the optimizer has it
    held = StageSet(model.spec, device)
    for parameter in model.frozen:
        parameter.requires_grad_(False)
    if (last := held.stages.get(held.last_stage)) is not None:
        last.metrics, last.select = model.metrics, model.select
    return held


def _fill(optimizer: LocalOptimizer, records: Mapping[int, Any], updating: int) -> None:
    """Give ``optimizer`` its groups and state, and the copies of what was before the update of step ``updating``."""
    replace(optimizer.optimizer, records[Part.GROUPS])
    for parameter, state in zip(optimizer.parameters, records[Part.STATE], strict=True):
        if state is not None:
            optimizer.optimizer.state[parameter] = state
    if updating >= 0:
        undo = optimizer.undo
        if len(records[Part.UNDO]) > len(undo.parameters):
            undo.cover(optimizer.parameters)
        undo.take_over(updating, _by_parameter(undo, records[Part.UNDO]), records[Part.UNDO_GROUPS])


def _by_parameter(undo: Undo, copies: Iterable[tuple[torch.Tensor, dict[str, Any]]]) -> Copies:
    return {parameter: (value, state) for parameter, (value, state) in zip(undo.parameters, copies, strict=True)}


def _snapshots(held: StageSet, record: tuple[int, dict[int, KeptSnapshot]] | None, *, ended: bool) -> Snapshots | None:
    if record is None:
        return None
    stream, taken = record
    slots = {}
    for number, kept in taken.items():
        undo = None
        if held.optimizer is not None and kept.copies is not None:
            undo = Undo(held.optimizer.parameters, held.optimizer.optimizer)
            undo.take_over(None, _by_parameter(undo, kept.copies), kept.groups)
        slots[number] = Snapshot(undo, _buffers(held, kept.buffers), kept.past)
    return Snapshots(stream, held.optimizer, held.buffered, slots, ended=ended)


def _buffers(held: StageSet, copies: Iterable[tuple[int, str, torch.Tensor, torch.Tensor]]) -> Buffers:
    owners, buffers = [owner for module in held.buffered for owner in module.modules()], Buffers()
    for index, name, buffer, copy in copies:
        live = owners[index]._buffers.get(name)
        # The same object, if it is still there: an attribute may be that object, too.
        same = live is not None and live.layout is torch.strided and live.data_ptr() == buffer.data_ptr()
        buffers.copies[owners[index], name] = live if live is not None and same else buffer, copy
    return buffers
