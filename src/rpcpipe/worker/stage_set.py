"""What a worker holds of one pipeline: its stages and their optimizer, and what may be asked of them between steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from rpcpipe.checkpoint import shard
from rpcpipe.checkpoint.manifest import Manifest
from rpcpipe.errors import CheckpointError
from rpcpipe.model import batchnorm, extra_state, layers, tied_weights, torch_settings
from rpcpipe.model.layers import Loss
from rpcpipe.model.tied_weights import Tie
from rpcpipe.model.torch_settings import TorchSettings
from rpcpipe.model.wiring import StageLinks, Wiring, outgoing
from rpcpipe.stage.accumulation import AccumulatedGradients
from rpcpipe.stage.optimizer import Factory, LocalOptimizer, Parameters
from rpcpipe.stage.recompute import Checkpoint, Recompute
from rpcpipe.stage.stage import Stage, StageOptions
from rpcpipe.transport import pickler
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
    ReceiveLayers,
    ReleaseLayers,
    Repartition,
    SaveShard,
    SetMetrics,
    SetSelection,
)

# By stage: its named layers, and the first one's index in the model.
Parts = dict[int, tuple[OrderedDict[str, layers.Layer], int]]


@dataclass
class ActorSpec:
    """What a worker needs to build its stages; travels pickled."""

    stages: Parts
    last_stage: int
    loss: Loss
    optimizer: Factory
    seed: int
    checkpoint: Checkpoint = "never"
    autocast: torch.dtype | None = None
    batch_norm: str = "micro_batch"
    # Of all the model's layers.
    wirings: Mapping[str, Wiring] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()
    stage_links: StageLinks = field(default_factory=StageLinks)
    peers: ReplicaGroup = field(default_factory=ReplicaGroup)
    # By layer, buffers whose memory other layers have too.
    shared_buffers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    settings: TorchSettings = field(default_factory=TorchSettings.current)


class StageSet:
    """Stages of one pipeline, and an optimizer over all their parameters."""

    def __init__(self, spec: ActorSpec, device: torch.device) -> None:
        self.stages: dict[int, Stage] = {}
        self.exchanges: dict[str, GradientExchange] = {}
        self._device = device
        self.spec = replace(spec, stages={}, settings=spec.settings.on(device))
        self.spec.settings.apply()
        self.optimizer: LocalOptimizer | None = None
        self.accumulated = AccumulatedGradients()
        self._loaded: shard.Loaded | None = None
        self._received: list[Any] = []
        self._build(spec.stages, spec.last_stage, spec.stage_links)

    def _build(self, parts: Parts, last_stage: int, stage_links: StageLinks) -> None:
        """Make the stages, and an optimizer over all their parameters."""
        self.last_stage = last_stage
        built = {
            number: OrderedDict((key, self._layer(layer, at)) for at, (key, layer) in enumerate(named.items(), first))
            for number, (named, first) in sorted(parts.items())
        }
        drawn = {key for named, _ in parts.values() for key, layer in named.items() if not isinstance(layer, nn.Module)}
        modules = {key: module for named in built.values() for key, module in named.items()}
        tied = tied_weights.join(modules, self.spec.ties, drawn, self.spec.seed)
        self.stages, seen = {}, set[nn.Parameter]()
        for number, named in built.items():
            self.stages[number] = self._stage(number, named, parts[number][1], stage_links, seen)
            seen.update(self.stages[number].module.parameters())
        self._exchange(tied, stage_links.members)
        spec = self.spec
        parameters = Parameters(pair for stage in self.stages.values() for pair in stage.named_parameters)
        self.optimizer = LocalOptimizer(spec.optimizer, parameters, self._updated_elsewhere) if parameters else None

    def _layer(self, layer: layers.Layer, index: int) -> nn.Module:
        module = layers.build(layer, seed=self.spec.seed, index=index)
        return batchnorm.defer(module) if self.spec.batch_norm == "deferred" else module

    def _stage(
        self,
        number: int,
        named: OrderedDict[str, nn.Module],
        first: int,
        stage_links: StageLinks,
        seen: Collection[nn.Parameter],
    ) -> Stage:
        spec, last_stage = self.spec, self.last_stage
        options = StageOptions(
            first, spec.seed, self._device, spec.loss if number == last_stage else None,
            Recompute(spec.checkpoint, number, last_stage, len(named)), spec.autocast,
        )  # fmt: skip
        wirings = [spec.wirings[name] for name in named]
        return Stage(
            number,
            named,
            options,
            wirings=wirings,
            outgoing=outgoing(stage_links.value_routes, number, last_stage),
            shared=seen,
            constant=[(name, path) for name in named for path in spec.shared_buffers.get(name, ())],
        )

    def _exchange(self, tied: Mapping[str, nn.Parameter], members: Mapping[str, tuple[str, ...]]) -> None:
        """Whom gradients are summed with: every parameter is in one group, a tied one in its own."""
        peers, apart = self.spec.peers, set(tied.values())
        self.exchanges = peers.exchanges(
            {number: [p for p in stage.parameters if p not in apart] for number, stage in self.stages.items()}
        )
        for group, parameter in tied.items():
            if len(members[group]) > 1:
                mine = [parameter] if parameter.requires_grad else []
                at = members[group].index(peers.name)
                self.exchanges[group] = GradientExchange(group, members[group], at, mine, [0] * len(mine))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of all stages here, in the model's order."""
        return [parameter for stage in self.stages.values() for parameter in stage.parameters]

    @property
    def owned_elsewhere(self) -> set[nn.Parameter]:
        """The parameters here whose gradients another worker sums."""
        return {parameter for exchange in self.exchanges.values() for parameter in exchange.owned_elsewhere}

    @property
    def _tied_elsewhere(self) -> set[nn.Parameter]:
        """Tied parameters whose first layer is on another worker, which keeps their sums."""
        here = self._modules()
        return {
            here[holder.layer].get_parameter(holder.parameter)
            for tie in self.spec.ties
            for holder in tie.holders
            if tie.holders[0].layer not in here and holder.layer in here
        }

    @property
    def _updated_elsewhere(self) -> set[nn.Parameter]:
        return self.owned_elsewhere if self.spec.peers.shard else set()

    def describe(self) -> dict[int, StageInfo]:
        """Describe the stages, by number."""
        return {number: self._info(number, stage) for number, stage in self.stages.items()}

    def _info(self, number: int, stage: Stage) -> StageInfo:
        named, exchange = list(stage.module.named_children()), self.exchanges.get(group_of(number))
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
        """Do what is asked for between steps."""
        match operation:
            case GetModule(number):
                return self.module(number)
            case GetParameter(number, name):
                return self.module(number).get_parameter(name)
            case CallModule(number, function, seed):
                return self._call(number, function, seed)
            case SetMetrics(metrics):
                self.stages[self.last_stage].metrics = pickler.loads(metrics)
            case SetSelection(function):
                self.stages[self.last_stage].select = pickler.loads(function)
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
            case ReceiveLayers(given):
                self._received = []  # what a move that another worker refused may have left
                self._received = [entry for blob in given for entry in pickler.loads(blob)]
            case GetOptimizerState():
                return self._optimizer_state()
            case Repartition():
                return self._repartition(operation)
            case _:
                assert_never(operation)
        return None

    def _call(self, number: int, function: bytes, seed: int | None) -> Any:
        """``function(module)`` of stage ``number``, which may change weights; the result pickled."""
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return pickler.dumps(pickler.loads(function)(self.stages[number].module))
        finally:
            torch_settings.forget()
            self._weights_changed()

    def module(self, number: int) -> nn.Module:
        """The stage's module itself, for an RRef to it."""
        return self.stages[number].module

    def _state_dict(self) -> dict[int, dict[str, Any]]:
        """Per stage its state under the unsplit model's names, on the CPU."""
        return {number: extra_state.packed(stage.module.state_dict()) for number, stage in self.stages.items()}

    def _load_state_dict(self, packed: Mapping[int, Mapping[str, Any]]) -> None:
        """Inverse of ``_state_dict``; every shape is checked before anything changes."""
        states = {number: extra_state.unpacked(state) for number, state in packed.items()}
        for number, state in states.items():
            live = self.stages[number].module.state_dict()
            for key, value in state.items():
                if extra_state.shape_differs(key, live[key], value):
                    raise CheckpointError(f"{key} has shape {tuple(value.shape)}, the model's {tuple(live[key].shape)}")
        for number, state in states.items():
            self.stages[number].module.load_state_dict(state)
        self._weights_changed()

    def _save(self, folder: Path, label: str) -> shard.Written:
        """Write optimizer state, and the first replica weights, to files of ``folder`` called ``label``."""
        first = self.spec.peers.index == 0
        return shard.write(self._stage_modules, self.optimizer, self.spec.seed, folder, label, with_weights=first)

    def _read_checkpoint(self, folder: Path, manifest: Manifest) -> list[str]:
        """Read what these stages need of a checkpoint, for ``ApplyCheckpoint``; the names of their weights."""
        self._loaded = None  # what an interrupted load may have left
        self._loaded = shard.read(self._stage_modules, self.optimizer, folder, manifest)
        return [name for weights in self._loaded.weights for name in weights]

    def _apply_checkpoint(self, seed: int) -> None:
        """Go on from what ``ReadCheckpoint`` has read, with random numbers from ``seed``."""
        assert self._loaded is not None
        self._loaded.apply()
        self._loaded = None
        self.spec = replace(self.spec, seed=seed)
        for stage in self.stages.values():
            stage.seed = seed
        self._weights_changed()

    def _release(self, names: Sequence[str]) -> bytes:
        """The named layers with their optimizer state and kept gradients, for another worker's ``Repartition``."""
        modules = {name: module for name, module in self._modules().items() if name in names}
        try:
            return pickler.dumps([(name, m, self._states_of(m), self.accumulated.of(m)) for name, m in modules.items()])
        except Exception as error:
            raise layers.unpicklable(
                modules, error, "nothing has moved: keep a schedule of this placement, or"
            ) from error

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """By layer and parameter."""
        return {name: self._states_of(module) for name, module in self._modules().items()}

    def _repartition(self, wanted: Repartition) -> dict[int, StageInfo]:
        parts, last_stage, stage_links, others = wanted
        modules, states = self._modules(), self._optimizer_state()
        received, self._received = self._received, []
        for name, module, state, kept in received:
            modules[name], states[name] = module, state
            self.accumulated.take(module, kept)
        for name, state in others.items():
            states[name] = {**states[name], **state}
        self._build(
            {
                number: (OrderedDict((name, modules[name]) for name in names), first)
                for number, (names, first) in parts.items()
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
        return {name: layer for stage in self.stages.values() for name, layer in stage.module.named_children()}

    def _states_of(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        state = {} if self.optimizer is None else self.optimizer.optimizer.state
        return {key: state[parameter] for key, parameter in module.named_parameters() if parameter in state}

    def _weights_changed(self) -> None:
        if self.optimizer is not None:
            self.optimizer.undo.invalidate()
