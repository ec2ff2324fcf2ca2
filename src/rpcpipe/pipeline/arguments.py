"""Check Pipeline's arguments before anything starts. Every error gives the values and says what to do."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rpcpipe import schedules
from rpcpipe._arguments import require_flag, require_iterable, require_kind
from rpcpipe.cluster.tenancy import PipelineCluster
from rpcpipe.driver.layout import Layout, stage_parts
from rpcpipe.driver.remote_batches import Following, RemoteBatches, RemoteValue
from rpcpipe.driver.settings import Settings
from rpcpipe.errors import (
    ArgumentError,
    CheckpointError,
    ModelError,
    PartitionError,
    ScheduleError,
    require,
    require_positive,
    require_whole,
    shown,
)
from rpcpipe.model import losses
from rpcpipe.model.batch import as_pair
from rpcpipe.model.batchnorm import MODES
from rpcpipe.model.extra_state import is_extra, shape_differs
from rpcpipe.model.layers import Layer, Loss, parameter_counts
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.sendable import as_argument, sendable
from rpcpipe.model.tied_weights import Tie
from rpcpipe.planning import Plan, partition
from rpcpipe.planning.layer_cost import UNDO, balancing_costs
from rpcpipe.schedules import Schedule
from rpcpipe.schedules.weight_versions import POLICIES, Policy
from rpcpipe.stage import precision
from rpcpipe.stage.hyperparameters import same
from rpcpipe.stage.optimizer import Factory
from rpcpipe.stage.recompute import Checkpoint
from rpcpipe.stage.recompute import check as check_checkpoint
from rpcpipe.worker.messages import StageInfo

_BALANCES = ("parameters", "time", "memory")
_DISPATCH = ("rref", "batched")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Holds all arguments of ``Pipeline`` but the model and the cluster; ``Pipeline`` documents them."""

    loss: Loss | None = None
    optimizer: Factory | None = None
    schedule: str | Schedule = "1f1b"
    chunks: int = 8
    balance: str | Sequence[int] = "parameters"
    checkpoint: Checkpoint = "never"
    virtual_stages: int = 1
    replicas: int = 1
    shard_optimizer: bool = False
    weights: str | None = None
    flush_every: int | None = None
    clip_grad_norm: float | None = None
    nonfinite: str = "skip"
    seed: int = 0
    dispatch: str = "rref"
    autocast: torch.dtype | None = None
    accumulate: int = 1
    batch_norm: str = "micro_batch"
    undo: str = "copy"
    sample: Nest = None

    def planned(self, plan: Plan | None) -> Options:
        """Return the options with the values that ``plan`` has decided; the same options if there is no plan."""
        if plan is None:
            return self
        require_kind("plan", plan, Plan, "what rp.plan returns, or None")
        return replace(
            self, schedule=plan.schedule, chunks=plan.chunks, balance=plan.balance, checkpoint=plan.checkpoint,
            virtual_stages=plan.virtual_stages, replicas=plan.replicas, shard_optimizer=plan.shard_optimizer,
            undo=plan.undo,
        )  # fmt: skip

    def checked(self) -> Options:
        """Return the options; raises ArgumentError for values that are wrong whatever the model and the cluster."""
        check_functions(self.loss, self.optimizer, self.dispatch)
        check_checkpoint(self.checkpoint)
        precision.check(self.autocast)
        check_types(self.schedule, self.balance, self.shard_optimizer)
        settings = check_settings(self.settings)
        return replace(
            self,
            chunks=require_whole("chunks", self.chunks),
            replicas=require_whole("replicas", self.replicas),
            seed=require_whole("seed", self.seed, least=-math.inf),
            **{
                name: getattr(settings, name)
                for name in ("accumulate", "clip_grad_norm", "flush_every", "virtual_stages")
            },
        )

    @property
    def settings(self) -> Settings:
        """Return the options that a running pipeline reads or changes."""
        return Settings(
            accumulate=self.accumulate,
            batch_norm=self.batch_norm,
            clip_grad_norm=self.clip_grad_norm,
            flush_every=self.flush_every,
            nonfinite=self.nonfinite,
            undo=self.undo,
            weights=self.weights,
            virtual_stages=self.virtual_stages,
            trains=self.optimizer is not None,
            has_loss=self.loss is not None,
        )


def layout_of(
    cluster: PipelineCluster, schedule: str | Schedule, balance: str | Sequence[int], virtual: int, replicas: int
) -> Layout:
    """Return the layout: the cluster's first workers, as many as schedule, balance and replicas need.

    Raises ArgumentError for an unknown schedule, and PartitionError for a wrong number of workers.
    """
    names = [worker.name for worker in cluster.workers]
    wanted, rest = divmod(len(names), replicas)
    if isinstance(schedule, Schedule):
        wanted, rest = schedule.workers, 0
    elif not isinstance(balance, str):
        wanted, rest = len(balance) // schedules.virtual_stages_of(schedule, virtual), 0
    copies = f" in {replicas} replicas" if replicas > 1 else ""
    if rest:
        raise PartitionError(
            f"{len(names)} workers do not divide into {replicas} replicas; launch a multiple of {replicas}, or"
            " say how many stages there are with balance=[…]"
        )
    if not 1 <= wanted * replicas <= len(names):
        raise PartitionError(
            f"{wanted} stages{copies} need {wanted * replicas} workers, the cluster has {len(names)}; launch more"
        )
    return Layout(tuple(names[: wanted * replicas]), replicas)


def make_schedule(
    schedule: str | Schedule, workers: int, chunks: int, virtual: int, replicas: int, *, trains: bool = True
) -> Schedule:
    """Return ``schedule``, or the schedule of that name for these sizes; raises ScheduleError if it cannot run.

    ``trains``: it needs backwards.
    """
    if isinstance(schedule, str):
        schedule = schedules.get(schedule, workers, chunks, virtual)
    if replicas > 1 and schedule.name in POLICIES:
        raise ScheduleError(
            f"{schedule.name!r} updates each replica's weights at its own times, so {replicas} replicas would part;"
            " use a synchronous schedule, for instance '1f1b', or replicas=1"
        )
    schedule.validate()
    if trains:
        schedule.check_backward()
    _check_updates(schedule)
    return schedule


def _check_updates(schedule: Schedule) -> None:
    """ScheduleError for updates (U), or an asynchronous schedule's name, in an order that no stream executes."""
    known = schedules.get(schedule.name, schedule.workers, schedule.chunks) if schedule.name in POLICIES else None
    if schedule.asynchronous if known is None else schedule.actions != known.actions:
        raise ScheduleError(
            f"schedule {schedule.name!r} is an order of its own with updates in it, or with an asynchronous schedule's"
            f" name; updates inside of a batch follow the orders {' and '.join(map(repr, POLICIES))} alone: pass such a"
            " name, or leave U out and give the schedule another one"
        )


def cut_layers(
    layers: OrderedDict[str, Layer],
    balance: str | Sequence[int],
    stages: int,
    measure: Callable[[], Any],
    undo: str,
) -> list[int]:
    """Return the number of layers of each stage, as ``balance`` gives it or as equal in cost as possible.

    ``measure()`` profiles the layers; it is called for the balances "time" and "memory" alone. Raises PartitionError
    if the layers cannot be cut so, ArgumentError for an unknown ``balance``.
    """
    if len(layers) < stages:
        raise PartitionError(
            f"the model has {len(layers)} layer{'s' * (len(layers) != 1)} and the schedule {stages} stages; use fewer"
            " workers or split layers"
        )
    if isinstance(balance, str):
        require(balance in _BALANCES, f"balance must be layers per stage or one of {_BALANCES}, not {balance!r}")
        if balance == "parameters":
            sizes = partition.balance(parameter_counts(layers), stages)
        else:
            measured = measure()
            sizes = partition.balance(
                balancing_costs(measured, balance, undo), stages, [layer.output_bytes for layer in measured]
            )
    else:
        sizes = partition.check_balance(balance, len(layers), stages)
    return sizes


def check_functions(loss: Any, optimizer: Any, dispatch: str) -> None:
    """Raise ArgumentError for a loss, optimizer or dispatch of a wrong kind, ModelError for a loss that cannot work."""
    require(
        loss is not None or optimizer is None,
        "optimizer=… needs loss=… to train; leave both out for a pipeline that only infers, or the optimizer for one"
        " that evaluates as well",
    )
    if loss is not None and not callable(loss):
        raise ArgumentError(f"loss must be callable as loss(output, target), not {shown(loss)}")
    if isinstance(loss, type):
        raise ArgumentError(f"loss must be callable as loss(output, target), and {loss.__name__} is a class: pass"
                            f" {loss.__name__}()")  # fmt: skip
    if optimizer is not None:
        losses.check(loss)
    if isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ArgumentError(
            f"optimizer must be a function of the parameters, not an object of type {kind}, because every worker makes"
            f" one for the parameters that it holds; pass for instance lambda params: {kind}(params, lr=…)"
        )
    require(
        optimizer is None or callable(optimizer),
        f"optimizer must be a function of the parameters, not {shown(optimizer)}",
    )
    require(dispatch in _DISPATCH, f"dispatch must be one of {_DISPATCH}, not {dispatch!r}")


def check_types(schedule: Any, balance: Any, shard_optimizer: Any) -> None:
    """Raise ArgumentError for a value of a wrong type."""
    require(
        isinstance(schedule, (str, Schedule)),
        f"schedule must be one of {', '.join(schedules.names())}, or a Schedule, not {schedule!r}",
    )
    check_balance(balance)
    require_flag("shard_optimizer", shard_optimizer)


def check_balance(balance: Any) -> None:
    """Raise ArgumentError for what is neither a name nor a list."""
    if not isinstance(balance, (str, Sequence)) or len(balance) == 0:
        raise ArgumentError(f"balance must be one of {_BALANCES} or a list of layers per stage, not {shown(balance)}")


def check_settings(settings: Settings) -> Settings:
    """Return the settings, numbers as int and float; raises ArgumentError for a wrong value."""
    nonfinite, batch_norm, clip, flush = (
        settings.nonfinite, settings.batch_norm, settings.clip_grad_norm, settings.flush_every
    )  # fmt: skip
    require(nonfinite in ("skip", "stop"), f"nonfinite must be 'skip' or 'stop', not {nonfinite!r}")
    require(batch_norm in MODES, f"batch_norm must be one of {MODES}, not {batch_norm!r}")
    require(settings.undo in UNDO, f"undo must be one of {UNDO}, not {settings.undo!r}")
    return replace(
        settings,
        accumulate=require_whole("accumulate", settings.accumulate),
        clip_grad_norm=None if clip is None else require_positive("clip_grad_norm", clip, ", or None not to clip"),
        flush_every=None if flush is None else require_whole("flush_every", flush, otherwise=", or None for never"),
        virtual_stages=require_whole("virtual_stages", settings.virtual_stages),
    )


def _names_of(tie: Tie) -> list[str]:
    """Return the names of a tied weight, or, if all layers have it under one, those of the layers."""
    names = list(dict.fromkeys(holder.name for holder in tie.holders))
    return names if len(names) > 1 else [f"{names[0]} of layer {holder.layer}" for holder in tie.holders]


def check_ties(policy: Policy | None, ties: Sequence[Tie], layers: Sequence[str], sizes: Sequence[int]) -> None:
    """Raise ScheduleError if weights are tied across stages and ``policy`` lets every stage update on its own.

    ``policy`` is None for synchronous schedules. ``sizes``: the number of layers of each stage.
    """
    stage_of = {name: stage for stage, (names, _) in stage_parts(layers, sizes).items() for name in names}
    for tie in ties if policy is not None else ():
        stages = sorted({stage_of[holder.layer] for holder in tie.holders})
        if len(stages) > 1:
            raise ScheduleError(
                f"{' and '.join(_names_of(tie))} are one weight, on stages"
                f" {' and '.join(map(str, stages))}, which an asynchronous schedule lets update at their own times;"
                " use a synchronous one, for instance '1f1b', or keep these layers on one stage with balance=[…]"
            )


def pairs(
    batches: Iterable[Any], call: str, is_there: Callable[[RemoteValue], bool] | None = None
) -> Iterable[tuple[Nest, Nest]]:
    """Return each batch as (inputs, targets); raises ArgumentError, when it comes to it, for anything but a pair.

    ``is_there`` asks the workers for a batch of RemoteBatches; without it these are returned themselves.
    """
    if isinstance(batches, RemoteBatches):
        return batches if is_there is None else Following(batches, is_there)
    require_iterable("batches", batches, "pairs (inputs, targets)")
    return _each_pair(batches, call)


def _each_pair(batches: Iterable[Any], call: str) -> Iterator[tuple[Nest, Nest]]:
    for batch in batches:
        yield as_pair(batch, f"pipe.{call} takes")


def check_groups(infos: Mapping[str, Sequence[StageInfo]]) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups; raises ModelError if no worker has one, or if their groups differ.

    ``infos``: each worker's descriptions of its stages.
    """
    groups = [info.groups for stages in infos.values() for info in stages if info.groups]
    require(
        bool(groups),
        "no parameter of the model requires a gradient: there is nothing to train; leave optimizer=… out to infer",
        error=ModelError,
    )
    require(
        len({len(group) for group in groups}) == 1,
        f"optimizer made {sorted({len(group) for group in groups})} parameter groups on different workers;"
        " return the same number of groups everywhere, empty ones too",
        error=ModelError,
    )
    _check_tied_groups(infos)
    return groups[0]


def _check_tied_groups(infos: Mapping[str, Sequence[StageInfo]]) -> None:
    """Raise ModelError unless every worker's optimizer has a tied weight in the same group, with the same options."""
    first: dict[str, tuple[str, int, Mapping[str, Any]]] = {}
    for worker, stages in infos.items():
        for info in stages:
            for weight, index in info.tied.items():
                other, expected, options = first.setdefault(weight, (worker, index, info.groups[index]))
                unequal = [key for key in options if not same(options[key], info.groups[index].get(key))]
                require(
                    index == expected and not unequal,
                    f"the optimizer puts {weight} into group {expected} on {other} and into group {index} on {worker}"
                    f"{', with another ' + ' and '.join(unequal) if unequal else ''}: its copies would part. Decide by"
                    " the names of params.named(), where a tied weight has its first name on all workers",
                    error=ModelError,
                )


def loadable(state: Any) -> dict[str, Any]:
    """Return a ``state_dict`` as it is sent, in host memory; raises CheckpointError for what cannot be sent."""
    if not isinstance(state, Mapping):
        raise ArgumentError(f"load_state_dict takes a state_dict, a mapping of names to tensors, not {state!r:.80}")
    loaded = dict(state)
    for key, value in state.items():
        if not is_extra(key):
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(f"{key} is {value!r:.80}, not a tensor; nothing has changed")
            with as_argument(CheckpointError):
                loaded[key] = sendable(value.detach(), f"{key} of the state_dict").cpu()
    return loaded


def check_state(live: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless ``state`` has the names, shapes and layouts of ``live``, the model's state."""
    missing, extra = sorted(live.keys() - state.keys()), sorted(state.keys() - live.keys())
    both = sorted(live.keys() & state.keys())
    no_tensors = [key for key in both if not is_extra(key) and not isinstance(state[key], torch.Tensor)]
    require(not no_tensors, f"the state has no tensor for {no_tensors[:5]}", error=CheckpointError)
    wrong = [key for key in both if shape_differs(key, live[key], state[key])]
    if missing or extra or wrong:
        raise CheckpointError(
            f"the state does not fit the model: missing {missing[:5]}, unexpected {extra[:5]}, wrong shape {wrong[:5]}"
        )
    for key in (key for key in live if not is_extra(key)):
        kinds = [(tensor.layout, tensor.is_quantized, tensor.is_complex()) for tensor in (live[key], state[key])]
        require(
            kinds[0] == kinds[1],
            f"{key} is {state[key].dtype} in the layout {state[key].layout}, the model's {live[key].dtype} in"
            f" {live[key].layout}, and torch does not copy one into the other; nothing has changed",
            error=CheckpointError,
        )
