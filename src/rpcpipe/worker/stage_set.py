"""A worker's stages of one pipeline with their optimizer, and the operations on them between steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, assert_never

import cloudpickle
import torch
from torch import nn

from rpcpipe.checkpoint import shard
from rpcpipe.checkpoint.manifest import Manifest
from rpcpipe.errors import CheckpointError
from rpcpipe.model import batchnorm, layers, tied_weights
from rpcpipe.model.layers import Loss
from rpcpipe.model.tied_weights import Tie
from rpcpipe.model.wiring import StageLinks, Wiring, outgoing
from rpcpipe.stage.accumulation import AccumulatedGradients
from rpcpipe.stage.optimizer import Factory, LocalOptimizer, Parameters
from rpcpipe.stage.recompute import Checkpoint, Recompute
from rpcpipe.stage.stage import Stage, StageOptions
from rpcpipe.worker.gradient_exchange import GradientExchange, ReplicaGroup, group_of
from rpcpipe.worker.messages import StageInfo
from rpcpipe.worker.operations import (
    ApplyCheckpoint,
    CallModule,
    DropCheckpoint,
    GetModule,
    GetOptimizerState,
    GetParameter,
    GetState,
    HoldingOperation,
    LoadState,
    ReadCheckpoint,
    ReleaseLayers,
    Repartition,
    SaveShard,
    SetMetrics,
    SetSelection,
)

# By stage: its named layers, and the first layer's index in the model.
Parts = dict[int, tuple[OrderedDict[str, layers.Layer], int]]


@dataclass
class ActorSpec:
    """All that a worker needs to build its stages; travels by cloudpickle."""

    stages: Parts
    last_stage: int
    loss: Loss
    optimizer: Factory
    seed: int
    checkpoint: Checkpoint = "never"
    autocast: torch.dtype | None = None
    batch_norm: str = "micro_batch"
    # By name, the wirings of all the model's layers, not only of this worker's.
    wirings: Mapping[str, Wiring] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()
    stage_links: StageLinks = field(default_factory=StageLinks)
    peers: ReplicaGroup = field(default_factory=ReplicaGroup)


class StageSet:
    """Stages of one pipeline, and an optimizer over all their parameters."""

    def __init__(self, spec: ActorSpec, device: torch.device) -> None:
        self.stages: dict[int, Stage] = {}
        self.exchanges: dict[str, GradientExchange] = {}
        self._device = device
        self.spec = replace(spec, stages={})
        self.optimizer: LocalOptimizer | None = None
        self.accumulated = AccumulatedGradients()
        self._loaded: shard.Loaded | None = None
        self._build(spec.stages, spec.last_stage, spec.stage_links)

    def _build(self, parts: Parts, last_stage: int, stage_links: StageLinks) -> None:
        """Build the stages ``parts``, and an optimizer over all their parameters."""
        self.last_stage = last_stage
        built = {
            index: OrderedDict((key, self._layer(layer, i)) for i, (key, layer) in enumerate(named.items(), first))
            for index, (named, first) in sorted(parts.items())
        }
        drawn = {key for named, _ in parts.values() for key, layer in named.items() if not isinstance(layer, nn.Module)}
        modules = {key: module for named in built.values() for key, module in named.items()}
        tied = tied_weights.join(modules, self.spec.ties, drawn, self.spec.seed)
        self.stages, seen = {}, set[nn.Parameter]()
        for index, named in built.items():
            self.stages[index] = self._stage(index, named, parts[index][1], stage_links, seen)
            seen.update(self.stages[index].module.parameters())
        self._exchange(tied, stage_links.members)
        spec = self.spec
        parameters = Parameters(pair for stage in self.stages.values() for pair in stage.named_parameters)
        self.optimizer = LocalOptimizer(spec.optimizer, parameters, self._updated_elsewhere) if parameters else None

    def _layer(self, layer: layers.Layer, index: int) -> nn.Module:
        module = layers.build(layer, seed=self.spec.seed, index=index)
        return batchnorm.defer(module) if self.spec.batch_norm == "deferred" else module

    def _stage(
        self,
        index: int,
        named: OrderedDict[str, nn.Module],
        first: int,
        stage_links: StageLinks,
        seen: Collection[nn.Parameter],
    ) -> Stage:
        spec, last_stage = self.spec, self.last_stage
        options = StageOptions(
            first, spec.seed, self._device, spec.loss if index == last_stage else None,
            Recompute(spec.checkpoint, index, last_stage, len(named)), spec.autocast,
        )  # fmt: skip
        wirings = [spec.wirings[name] for name in named]
        return Stage(
            index,
            named,
            options,
            wirings=wirings,
            outgoing=outgoing(stage_links.value_routes, index, last_stage),
            shared=seen,
        )

    def _exchange(self, tied: Mapping[str, nn.Parameter], members: Mapping[str, tuple[str, ...]]) -> None:
        """Create the exchanges. Every parameter is in one group; each tied parameter has a separate group."""
        peers, apart = self.spec.peers, set(tied.values())
        self.exchanges = peers.exchanges(
            {index: [p for p in stage.parameters if p not in apart] for index, stage in self.stages.items()}
        )
        for group, parameter in tied.items():
            if len(members[group]) > 1:
                trainable = [parameter] if parameter.requires_grad else []
                member = members[group].index(peers.name)
                self.exchanges[group] = GradientExchange(group, members[group], member, trainable, [0] * len(trainable))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of all stages of this worker, in the model's order."""
        return [parameter for stage in self.stages.values() for parameter in stage.parameters]

    @property
    def owned_elsewhere(self) -> set[nn.Parameter]:
        """The parameters of this worker's stages whose gradients another worker sums."""
        return {parameter for exchange in self.exchanges.values() for parameter in exchange.owned_elsewhere}

    @property
    def _tied_elsewhere(self) -> set[nn.Parameter]:
        """The tied parameters whose first layer is on another worker, which keeps their accumulated gradients."""
        modules = self._modules()
        return {
            modules[holder.layer].get_parameter(holder.parameter)
            for tie in self.spec.ties
            for holder in tie.holders
            if tie.holders[0].layer not in modules and holder.layer in modules
        }

    @property
    def _updated_elsewhere(self) -> set[nn.Parameter]:
        """The parameters whose optimizer state is on another replica."""
        return self.owned_elsewhere if self.spec.peers.shard else set()

    def describe(self) -> dict[int, StageInfo]:
        """Return the description of every stage, by stage."""
        return {index: self._info(index, stage) for index, stage in self.stages.items()}

    def _info(self, index: int, stage: Stage) -> StageInfo:
        named, exchange = list(stage.module.named_children()), self.exchanges.get(group_of(index))
        parameters, trained = list(stage.module.parameters()), set(stage.parameters)
        return StageInfo(
            layers=[name for name, _ in named],
            sizes={name: sum(p.numel() for p in layer.parameters()) for name, layer in named},
            trainable=[name for name, p in stage.module.named_parameters() if p in trained],
            parameters=sum(p.numel() for p in parameters),
            bytes=sum(p.numel() * p.element_size() for p in parameters),
            buffered=any(True for _ in stage.module.buffers()),
            device=str(stage.device),
            groups=self.optimizer.groups() if self.optimizer is not None else [],
            wired=any(self.spec.wirings[name] != Wiring() for name, _ in named),
            sharded=self.spec.peers.shard,
            buckets=[] if exchange is None else exchange.owners,
        )

    def execute(self, operation: HoldingOperation) -> Any:
        """Execute an operation between steps and return its result."""
        match operation:
            case GetModule(stage):
                return self.module(stage)
            case GetParameter(stage, name):
                return self.module(stage).get_parameter(name)
            case CallModule(stage, function, seed):
                return self._call(stage, function, seed)
            case SetMetrics(metrics):
                self.stages[self.last_stage].metrics = cloudpickle.loads(metrics)
            case SetSelection(function):
                self.stages[self.last_stage].select = cloudpickle.loads(function)
            case GetState():
                return self._state_dict()
            case LoadState(states):
                self._load_state_dict(states)
            case SaveShard(folder, label):
                return self._save(folder, label)
            case ReadCheckpoint(folder, manifest):
                return self._read_checkpoint(folder, manifest)
            case ApplyCheckpoint(seed):
                self._apply_checkpoint(seed)
            case DropCheckpoint():
                self._loaded = None
            case ReleaseLayers(names):
                return self._release(names)
            case GetOptimizerState():
                return self._optimizer_state()
            case Repartition():
                return self._repartition(operation)
            case _:
                assert_never(operation)
        return None

    def _call(self, stage: int, function: bytes, seed: int | None) -> Any:
        """Return the cloudpickled result of ``function(module)`` of ``stage``, which may change weights."""
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return cloudpickle.dumps(cloudpickle.loads(function)(self.stages[stage].module))
        finally:
            self._weights_changed()

    def module(self, stage: int) -> nn.Module:
        """Return the module of ``stage`` itself, for an RRef to it."""
        return self.stages[stage].module

    def _state_dict(self) -> dict[int, dict[str, torch.Tensor]]:
        """Return each stage's state under the unsplit model's names, on the CPU."""
        return {
            index: {key: value.detach().cpu() for key, value in stage.module.state_dict().items()}
            for index, stage in self.stages.items()
        }

    def _load_state_dict(self, states: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Load the states that ``_state_dict`` returns.

        Raises CheckpointError for a shape that differs from the model's, before any tensor changes.
        """
        for index, state in states.items():
            live = self.stages[index].module.state_dict()
            for key, value in state.items():
                if live[key].shape != value.shape:
                    raise CheckpointError(f"{key} has shape {tuple(value.shape)}, the model's {tuple(live[key].shape)}")
        for index, state in states.items():
            self.stages[index].module.load_state_dict(dict(state))
        self._weights_changed()

    def _save(self, folder: Path, label: str) -> shard.Written:
        """Write the optimizer's state, and on the first replica the weights, to files of ``folder`` named ``label``."""
        first = self.spec.peers.index == 0
        return shard.write(self._stage_modules, self.optimizer, self.spec.seed, folder, label, with_weights=first)

    def _read_checkpoint(self, folder: Path, manifest: Manifest) -> list[str]:
        """Read what the stages need of a checkpoint, for ``ApplyCheckpoint``; return the names of their weights."""
        self._loaded = None  # free what an interrupted load may have left, before more is read
        self._loaded = shard.read(self._stage_modules, self.optimizer, folder, manifest)
        return [name for weights in self._loaded.weights for name in weights]

    def _apply_checkpoint(self, seed: int) -> None:
        """Replace the live state by what ``ReadCheckpoint`` has read, and the seed of random numbers by ``seed``."""
        assert self._loaded is not None
        self._loaded.apply()
        self._loaded = None
        self.spec = replace(self.spec, seed=seed)
        for stage in self.stages.values():
            stage.seed = seed
        self._weights_changed()

    def _release(self, names: Sequence[str]) -> bytes:
        """Return the cloudpickled layers ``names``, each with its optimizer state and accumulated gradients."""
        released = [(name, module) for name, module in self._modules().items() if name in names]
        return bytes(cloudpickle.dumps([(name, m, self._states_of(m), self.accumulated.of(m)) for name, m in released]))

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Return the optimizer's state by layer and parameter."""
        return {name: self._states_of(module) for name, module in self._modules().items()}

    def _repartition(self, operation: Repartition) -> dict[int, StageInfo]:
        """Rebuild the stages from this worker's and the received layers; return their descriptions."""
        parts, last_stage, stage_links, received, others = operation
        modules, states = self._modules(), self._optimizer_state()
        for name, module, state, accumulated in (entry for blob in received for entry in cloudpickle.loads(blob)):
            modules[name], states[name] = module, state
            self.accumulated.take(module, accumulated)
        for name, state in others.items():
            states[name] = {**states[name], **state}
        self._build(
            {
                index: (OrderedDict((name, modules[name]) for name in names), first)
                for index, (names, first) in parts.items()
            },
            last_stage,
            stage_links,
        )
        self.accumulated.forget(self._tied_elsewhere)
        elsewhere = self._updated_elsewhere
        for name in (name for names, _ in parts.values() for name in names):
            for key, state in states[name].items():
                if (parameter := modules[name].get_parameter(key)) not in elsewhere:
                    assert self.optimizer is not None
                    self.optimizer.optimizer.state[parameter] = state
        self._weights_changed()
        return self.describe()

    @property
    def _stage_modules(self) -> list[nn.Module]:
        return [stage.module for stage in self.stages.values()]

    def _modules(self) -> dict[str, nn.Module]:
        """Return the layers of all stages by name."""
        return {name: layer for stage in self.stages.values() for name, layer in stage.module.named_children()}

    def _states_of(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        """Return the optimizer's state of the parameters of ``module``, by the parameter's name."""
        state = {} if self.optimizer is None else self.optimizer.optimizer.state
        return {key: state[parameter] for key, parameter in module.named_parameters() if parameter in state}

    def _weights_changed(self) -> None:
        """Invalidate the rollback copy, which no longer equals the weights."""
        if self.optimizer is not None:
            self.optimizer.undo.invalidate()
