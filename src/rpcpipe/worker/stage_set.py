"""A worker's stages of one pipeline with their optimizer, and the operations on them between steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import Any, assert_never

import torch
from torch import nn

from rpcpipe.errors import ModelError, require
from rpcpipe.model import batchnorm, layers, tied_weights, torch_settings
from rpcpipe.model.language_model import release_caches
from rpcpipe.model.wiring import StageLinks, Wiring, outgoing
from rpcpipe.stage.accumulation import AccumulatedGradients
from rpcpipe.stage.gradients import has_hooks, remove_hooks
from rpcpipe.stage.optimizer import LocalOptimizer, Parameters
from rpcpipe.stage.recompute import Recompute, is_ratio
from rpcpipe.stage.stage import Stage, StageOptions
from rpcpipe.stage.trainable import refuse_thawed
from rpcpipe.transport import user_pickling
from rpcpipe.worker.actor_spec import ActorSpec, Parts
from rpcpipe.worker.gradient_exchange import GradientExchange, group_of
from rpcpipe.worker.messages import KeptAt, StageInfo
from rpcpipe.worker.operations import (
    CallModule,
    GetModule,
    GetOptimizerState,
    GetParameter,
    ReceiveLayers,
    ReleaseCaches,
    ReleaseLayers,
    Repartition,
    SetMetrics,
    SetSelection,
    StageOperation,
)


class StageSet:
    """Stages of one pipeline, and an optimizer over all their parameters. ``kept_at``: where they are kept."""

    def __init__(self, spec: ActorSpec, device: torch.device) -> None:
        self.stages: dict[int, Stage] = {}
        self.exchanges: dict[str, GradientExchange] = {}
        self._device = device
        self.spec = replace(spec, stages={}, settings=spec.settings.on(device))
        self.spec.settings.apply()
        self.optimizer: LocalOptimizer | None = None
        self.accumulated = AccumulatedGradients()
        self.kept_at: KeptAt | None = None
        self._tied: Mapping[str, nn.Parameter] = {}
        self._received: list[Any] = []
        self._build(spec.stages, spec.last_stage, spec.stage_links)

    def _build(self, parts: Parts, last_stage: int, stage_links: StageLinks) -> None:
        """Build the stages ``parts``, and an optimizer over all their parameters."""
        self.last_stage, self._stage_links = last_stage, stage_links
        built = {
            index: OrderedDict((key, self._layer(key, layer, i)) for i, (key, layer) in enumerate(named.items(), first))
            for index, (named, first) in sorted(parts.items())
        }
        drawn = {key for named, _ in parts.values() for key, layer in named.items() if not isinstance(layer, nn.Module)}
        modules = {key: module for named in built.values() for key, module in named.items()}
        tied = tied_weights.join(modules, self.spec.ties, drawn, self.spec.seed)
        self.stages, seen = {}, set[nn.Parameter]()
        for index, named in built.items():
            self.stages[index] = self._stage(index, named, parts[index][1], stage_links, seen)
            seen.update(self.stages[index].module.parameters())
        self._tied = tied
        self._check_tied_hooks()
        self._exchange(tied, stage_links.members)
        spec = self.spec
        first = {tied[tie.group]: tie.holders[0].name for tie in spec.ties if tie.group in tied}
        parameters = Parameters(
            (first.get(parameter, name), parameter)
            for stage in self.stages.values()
            for name, parameter in stage.named_parameters
        )
        self.optimizer = None
        if parameters and spec.optimizer is not None:
            elsewhere = self._updated_elsewhere
            is_whole = len(self.stages) > last_stage and not elsewhere
            self.optimizer = LocalOptimizer(
                spec.optimizer, parameters, elsewhere, is_whole=is_whole, copies=spec.copies
            )  # fmt: skip

    def _layer(self, name: str, layer: layers.Layer, index: int) -> nn.Module:
        module = layers.build(layer, seed=self.spec.seed, index=index)
        layers.check_embeddings(name, module)
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
            constant=[(name, path) for name in named for path in spec.shared_buffers.get(name, ())],
        )

    def _check_tied_hooks(self) -> None:
        """Refuse hooks on a weight whose gradient autograd does not sum before they run."""
        whole = [set() if is_ratio(self.spec.checkpoint) else self._layers_of(stage) for stage in self.stages.values()]
        for tie in self.spec.ties:
            sharing = {holder.layer for holder in tie.holders}
            if tie.group in self._tied and has_hooks(self._tied[tie.group]):
                require(
                    any(sharing <= layers for layers in whole),
                    f"{' and '.join(holder.name for holder in tie.holders)} are one weight, whose hooks would run on"
                    " parts of its gradient: keep these layers on one stage with balance=[…] and no ratio for"
                    " checkpoint, or remove the hooks",
                    error=ModelError,
                )

    @staticmethod
    def _layers_of(stage: Stage) -> set[str]:
        return {name for name, _ in stage.module.named_children()}

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
        indices = self.optimizer.index_of if self.optimizer is not None else {}
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
            tied={group: indices[weight] for group, weight in self._tied.items() if weight in indices},
            kept_at=self.kept_at,
        )

    def current_spec(self) -> ActorSpec:
        """Return a spec that builds these stages anew, around the same modules."""
        return replace(
            self.spec,
            stages={
                index: (OrderedDict(stage.module.named_children()), stage.first_layer)
                for index, stage in self.stages.items()
            },
            last_stage=self.last_stage,
            stage_links=self._stage_links,
            loss=self.spec.loss if self.loss is None else self.loss,
        )

    def switch_to_own_modes(self) -> None:
        """Give the modules the training flags that they have between steps."""
        for stage in self.stages.values():
            stage.modes.switch(training=True)

    def execute(self, operation: StageOperation) -> Any:
        """Execute an operation between steps, after ``switch_to_own_modes``, and return its result."""
        match operation:
            case GetModule(stage):
                return self.module(stage)
            case GetParameter(stage, name):
                return self.module(stage).get_parameter(name)
            case CallModule(stage, function, seed):
                return self._call(stage, function, seed)
            case SetMetrics(metrics):
                self.stages[self.last_stage].metrics = user_pickling.loads(metrics)
            case SetSelection(function):
                self.stages[self.last_stage].select = user_pickling.loads(function)
            case ReleaseCaches():
                release_caches()
            case ReleaseLayers(names):
                return self._release(names)
            case ReceiveLayers(given):
                self._received = []  # what a move that another worker refused may have left
                self._received = [user_pickling.loads(blob) for blob in given]
            case GetOptimizerState():
                return self._optimizer_state()
            case Repartition():
                return self._repartition(operation)
            case _:
                assert_never(operation)
        return None

    def _call(self, stage: int, function: bytes, seed: int | None) -> Any:
        """Return the pickled result of ``function(module)`` of ``stage``, which may change weights."""
        if seed is not None:
            torch.manual_seed(seed)
        module, optimized = self.stages[stage].module, set(self.optimizer.parameters if self.optimizer else ())
        infers = self.spec.optimizer is None
        try:
            with nullcontext() if infers else refuse_thawed(module, optimized), self._refuse_tied_hooks():
                return user_pickling.dumps(user_pickling.loads(function)(module))
        finally:
            torch_settings.forget()
            self.weights_changed()

    @contextmanager
    def _refuse_tied_hooks(self) -> Iterator[None]:
        """``_check_tied_hooks`` of the hooks that the block registers, which are removed if it refuses them."""
        yield
        try:
            self._check_tied_hooks()
        except ModelError:
            for parameter in self._tied.values():
                remove_hooks(parameter)
            raise

    def module(self, stage: int) -> nn.Module:
        """Return the module of ``stage`` itself, with its own training flags, for an RRef to it."""
        self.stages[stage].modes.switch(training=True)
        return self.stages[stage].module

    def _release(self, names: Sequence[str]) -> bytes:
        """Return the pickled layers ``names``, with their optimizer state, gradients and groups."""
        modules = {name: module for name, module in self._modules().items() if name in names}
        entries = [(name, m, self._states_of(m), self.accumulated.of(m)) for name, m in modules.items()]
        try:
            return user_pickling.dumps((entries, self._used_groups(), self.loss, self.seed))
        except Exception as error:
            after = "nothing has moved: keep a schedule of this placement, or"
            raise layers.unpicklable(modules, error, after) from error

    def _used_groups(self) -> list[dict[str, Any] | None]:
        return [] if self.optimizer is None else self.optimizer.used_groups()

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Return the optimizer's state by layer and parameter."""
        return {name: self._states_of(module) for name, module in self._modules().items()}

    def _repartition(self, operation: Repartition) -> dict[int, StageInfo]:
        """Rebuild the stages from this worker's and the received layers; return their descriptions."""
        parts, last_stage, stage_links, others = operation
        modules, states = self._modules(), self._optimizer_state()
        received, self._received = self._received, []
        groups = [self._used_groups()]
        for entries, used, loss, seed in received:
            self.reseed(seed)  # of all workers, which a load may have changed
            groups.append(used)
            if loss is not None:  # it goes along with what it remembers
                self.spec = replace(self.spec, loss=loss)
            for name, module, state, accumulated in entries:
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
        self.accumulated.retain({*self.parameters} - self._tied_elsewhere)
        self._carry_over(groups)
        optimized = self.optimizer.group_of if self.optimizer is not None else {}
        for name in (name for names, _ in parts.values() for name in names):
            for key, state in states[name].items():
                # Another replica may have it, or a call of the user's may have frozen it.
                if (parameter := modules[name].get_parameter(key)) in optimized:
                    assert self.optimizer is not None
                    self.optimizer.optimizer.state[parameter] = state
        self.weights_changed()
        return self.describe()

    def _carry_over(self, before: Sequence[Sequence[Mapping[str, Any] | None]]) -> None:
        """Give the new optimizer's groups the entries that they had in ``before``: here, or where layers come from."""
        if self.optimizer is not None:
            rows = zip_longest(*filter(None, before))
            found = [next((group for group in row if group is not None), {}) for row in rows]
            if found:
                self.optimizer.adopt(found, {})

    @property
    def stage_modules(self) -> list[nn.Module]:
        """The stages' containers of layers."""
        return [stage.module for stage in self.stages.values()]

    @property
    def loss(self) -> layers.Loss | None:
        """The loss, on the worker of the last stage."""
        return self.stages[self.last_stage].loss if self.last_stage in self.stages else None

    @property
    def buffered(self) -> list[nn.Module]:
        """The modules whose buffers a step may change."""
        return [*self.stage_modules, *([self.loss] if isinstance(self.loss, nn.Module) else [])]

    @property
    def parts(self) -> list[Any]:
        """All modules and losses, whose attributes a forward may change."""
        loss = list(self.loss.modules()) if isinstance(self.loss, nn.Module) else [self.loss]
        return [*(part for module in self.stage_modules for part in module.modules()), *loss]

    @property
    def seed(self) -> int:
        """The seed of random numbers."""
        return self.spec.seed

    @property
    def first_replica(self) -> bool:
        """Whether this worker is in the first replica."""
        return self.spec.peers.index == 0

    def reseed(self, seed: int) -> None:
        """Let random numbers come from ``seed``."""
        self.spec = replace(self.spec, seed=seed)
        for stage in self.stages.values():
            stage.seed = seed

    def _modules(self) -> dict[str, nn.Module]:
        """Return the layers of all stages by name."""
        return {name: layer for stage in self.stages.values() for name, layer in stage.module.named_children()}

    def _states_of(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        """Return the optimizer's state of the parameters of ``module``, by the parameter's name."""
        state = {} if self.optimizer is None else self.optimizer.optimizer.state
        return {key: state[parameter] for key, parameter in module.named_parameters() if parameter in state}

    def weights_changed(self) -> None:
        """Note that the rollback copy does not equal the weights any more."""
        if self.optimizer is not None:
            self.optimizer.undo.note_change()
