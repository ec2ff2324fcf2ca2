"""The state of a worker's stages as a whole: read, loaded, saved to disk, and kept for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rpcpipe.checkpoint import shard
from rpcpipe.checkpoint.manifest import Manifest
from rpcpipe.errors import CheckpointError, ModelError
from rpcpipe.model import extra_state, losses, rng
from rpcpipe.model.microbatch import map_tensors
from rpcpipe.stage.attributes import Attributes
from rpcpipe.stage.hyperparameters import same
from rpcpipe.stage.rollback import Buffers, Undo
from rpcpipe.worker.messages import OptimizerPart
from rpcpipe.worker.operations import (
    ApplyCheckpoint,
    DropCheckpoint,
    GetOptimizer,
    GetState,
    HoldingOperation,
    KeepState,
    LoadOptimizer,
    LoadState,
    ReadCheckpoint,
    RestoreState,
    SaveShard,
)
from rpcpipe.worker.stage_set import StageSet


class StageState:
    """The state of all stages of ``held``. ``fresh_loss``: the loss's when the pipeline was made, if not as it is."""

    def __init__(self, held: StageSet, fresh_loss: dict[str, Any] | None = None) -> None:
        self._held = held
        self._loaded: shard.Loaded | None = None
        self._kept: tuple[Buffers, Undo | None, Attributes, rng.PythonState] | None = None
        self.fresh_loss = losses.state(held.spec.loss) if fresh_loss is None else fresh_loss
        self._loss_is_checked = len(held.spec.peers.workers) < 2

    def execute(self, operation: HoldingOperation) -> Any:
        """Execute an operation between steps, with the modules' own training flags, and return its result."""
        self._held.switch_to_own_modes()
        match operation:
            case GetState(trainable):
                return self._get(trainable)
            case LoadState(states):
                self._load(states)
            case SaveShard(folder, label):
                return self._save(folder, label)
            case ReadCheckpoint(folder, manifest):
                return self._read(folder, manifest)
            case ApplyCheckpoint(seed):
                self._apply(seed)
            case DropCheckpoint():
                self._loaded = None
            case GetOptimizer(with_state):
                return self._optimizer_part(with_state)
            case LoadOptimizer(groups, states):
                self._load_optimizer(groups, states)
            case KeepState():
                return self._keep()
            case RestoreState():
                self._restore()
            case _:
                return self._held.execute(operation)
        return None

    def _get(self, trainable: bool) -> dict[int, dict[str, Any]]:
        """Return each stage's state, or its ``trainable`` parameters, under the unsplit model's names, on the CPU."""
        states = {}
        for index, stage in self._held.stages.items():
            state = stage.module.state_dict()
            named = stage.module.named_parameters(remove_duplicate=False)
            wanted = {name for name, parameter in named if parameter.requires_grad} if trainable else state.keys()
            states[index] = extra_state.packed({name: value for name, value in state.items() if name in wanted})
        return states

    def _load(self, packed: Mapping[int, Mapping[str, Any]]) -> None:
        """Load the states that ``_get`` returns.

        Raises CheckpointError for a shape that differs from the model's, before any tensor changes.
        """
        states = {index: extra_state.unpacked(state) for index, state in packed.items()}
        for index, state in states.items():
            live = self._held.stages[index].module.state_dict()
            for key, value in state.items():
                if extra_state.shape_differs(key, live[key], value):
                    raise CheckpointError(f"{key} has shape {tuple(value.shape)}, the model's {tuple(live[key].shape)}")
        for index, state in states.items():
            self._held.stages[index].module.load_state_dict(state)
        self._held.weights_changed()

    def _save(self, folder: Path, label: str) -> shard.Written:
        """Write the optimizer's state, and on the first replica the weights, to files of ``folder`` named ``label``."""
        held = self._held
        return shard.write(
            held.stage_modules, held.optimizer, held.seed, folder, label, with_weights=held.first_replica,
            loss=self._changed_loss() if held.first_replica else {},
        )  # fmt: skip

    def _read(self, folder: Path, manifest: Manifest) -> list[str]:
        """Read what the stages need of a checkpoint, for ``ApplyCheckpoint``; return the names of their weights."""
        self._loaded = None  # free what an interrupted load may have left, before more is read
        self._loaded = shard.read(self._held.stage_modules, self._held.optimizer, folder, manifest)
        try:
            self._try_loss(self._loaded.loss)
        except Exception as error:
            raise CheckpointError(
                f"{folder}: the loss does not take its saved state: {type(error).__name__}: {error}"
            ) from error
        return [name for weights in self._loaded.weights for name in weights]

    def _apply(self, seed: int) -> None:
        """Replace the live state by what ``ReadCheckpoint`` has read, and the seed of random numbers by ``seed``."""
        assert self._loaded is not None
        self._loaded.apply()
        if self._held.loss is not None and (self._loaded.loss or self._changed_loss()):
            self._held.loss.load_state_dict({**self.fresh_loss, **self._loaded.loss})  # type: ignore[attr-defined]
        self._loaded = None
        self._held.reseed(seed)
        self._held.weights_changed()

    def _optimizer_part(self, with_state: bool) -> OptimizerPart:
        optimizer, parts = self._held.optimizer, dict[int, dict[str, tuple[tuple[int, ...], int | None]]]()
        if optimizer is None:
            return OptimizerPart([], [], parts, {})
        indices, states = optimizer.index_of, dict[str, dict[str, Any]]()
        for stage, name, parameter in self._trained():
            parts.setdefault(stage, {})[name] = tuple(parameter.shape), indices.get(parameter)
            if with_state and parameter in optimizer.optimizer.state:
                states[name] = map_tensors(lambda t: t.detach().cpu(), dict(optimizer.optimizer.state[parameter]))
        used = [group is not None for group in optimizer.used_groups()]
        return OptimizerPart(optimizer.groups(), used, parts, states)

    def _trained(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        """Yield (stage, name in the unsplit model, parameter) for all that require gradients."""
        for index, stage in self._held.stages.items():
            for name, parameter in stage.module.named_parameters():
                if parameter.requires_grad:
                    yield index, name, parameter

    def _load_optimizer(self, groups: Sequence[Mapping[str, Any]], states: Mapping[str, Mapping[str, Any]]) -> None:
        if (optimizer := self._held.optimizer) is not None:
            group_of = optimizer.group_of
            placed = {
                parameter: shard.placed(dict(states[name]), parameter.device, group_of[parameter])
                for _, name, parameter in self._trained()
                if parameter in group_of
            }
            optimizer.adopt(groups, placed)

    def _try_loss(self, saved: Mapping[str, Any]) -> None:
        """Raise what the loss raises when it loads ``saved``; it has its own state again afterwards."""
        if self._held.loss is None or not saved:
            return
        before: dict[str, Any] = losses.state(self._held.loss)
        if unknown := saved.keys() - before.keys():
            raise CheckpointError(f"this pipeline's has no {sorted(map(str, unknown))}")
        try:
            self._held.loss.load_state_dict({**self.fresh_loss, **saved})  # type: ignore[attr-defined]
        finally:
            self._held.loss.load_state_dict(before)  # type: ignore[attr-defined]

    def check_loss(self) -> None:
        """Raise ModelError if the loss remembers something, which every replica's would do for itself."""
        if self._held.loss is None or self._loss_is_checked:
            return
        if changed := self._changed_loss():
            raise ModelError(
                f"the loss changes {next(iter(changed))!r} of its state_dict, and each replica's loss sees a share of"
                " the batches: use replicas=1, or a loss that remembers nothing"
            )
        self._loss_is_checked = True

    def _changed_loss(self) -> dict[str, Any]:
        """Return what the last stage's loss has changed of its state; nothing on other stages."""
        return {
            key: value
            for key, value in losses.state(self._held.loss).items()
            if key not in self.fresh_loss or not same(value, self.fresh_loss[key])
        }

    def _keep(self) -> int:
        """Copy what a step changes; return the seed of random numbers."""
        buffers, optimizer = Buffers(), self._held.optimizer
        buffers.take(self._held.buffered)
        undo = None if optimizer is None else Undo(optimizer.parameters, optimizer.optimizer)
        if undo is not None:
            undo.refresh()
        self._kept = buffers, undo, Attributes(self._held.parts), rng.python_state()
        return self._held.seed

    def _restore(self) -> None:
        """Put the state back that ``_keep`` has copied."""
        assert self._kept is not None
        (buffers, undo, attributes, random), self._kept = self._kept, None
        buffers.restore()
        attributes.put()
        rng.set_python_state(random)
        if undo is not None:
            undo.restore()
        self._held.weights_changed()
