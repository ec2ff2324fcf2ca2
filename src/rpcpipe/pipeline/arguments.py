"""Check Pipeline's arguments before anything starts. Every error gives the values and says what to do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rpcpipe import schedules
from rpcpipe.cluster.cluster import PipelineCluster
from rpcpipe.driver.layout import Layout, stage_parts
from rpcpipe.driver.runtime import Settings
from rpcpipe.errors import ArgumentError, CheckpointError, PartitionError, ScheduleError, require
from rpcpipe.model.batchnorm import MODES
from rpcpipe.model.layers import Layer, Loss, parameter_counts
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.tied_weights import Tie
from rpcpipe.planning import Plan, partition
from rpcpipe.planning.layer_cost import balancing_costs
from rpcpipe.schedules import Schedule
from rpcpipe.schedules.weight_versions import POLICIES
from rpcpipe.stage import precision
from rpcpipe.stage.optimizer import Factory
from rpcpipe.stage.recompute import Checkpoint
from rpcpipe.stage.recompute import check as check_checkpoint

_BALANCES = ("parameters", "time", "memory")
_DISPATCH = ("rref", "batched")


@dataclass(frozen=True)
class Options:
    """Holds all arguments of ``Pipeline`` but the model and the cluster; ``Pipeline`` documents them."""

    loss: Loss
    optimizer: Factory
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
    sample: Nest = None

    def planned(self, plan: Plan | None) -> Options:
        """Return the options with the values that ``plan`` has decided; the same options if there is no plan."""
        if plan is None:
            return self
        return replace(
            self, schedule=plan.schedule, chunks=plan.chunks, balance=plan.balance, checkpoint=plan.checkpoint,
            virtual_stages=plan.virtual_stages, replicas=plan.replicas, shard_optimizer=plan.shard_optimizer,
        )  # fmt: skip

    def checked(self) -> Options:
        """Return the options; raises ArgumentError for values that are wrong whatever the model and the cluster."""
        check_functions(self.loss, self.optimizer, self.dispatch, self.chunks)
        check_checkpoint(self.checkpoint)
        check_training(self.nonfinite, self.flush_every, self.accumulate, self.autocast, self.batch_norm)
        return self

    @property
    def settings(self) -> Settings:
        """Return the options that a running pipeline reads or changes."""
        return Settings(
            self.accumulate, self.batch_norm, self.clip_grad_norm, self.flush_every, self.nonfinite, self.weights,
            self.virtual_stages,
        )  # fmt: skip


def layout_of(
    cluster: PipelineCluster, schedule: str | Schedule, balance: str | Sequence[int], virtual: int, replicas: int
) -> Layout:
    """Return the layout: the cluster's first workers, as many as schedule, balance and replicas need.

    Raises ArgumentError, ScheduleError for an unknown schedule, and PartitionError for a wrong number of workers.
    """
    require(replicas >= 1, f"replicas must be at least 1, not {replicas}")
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


def make_schedule(schedule: str | Schedule, workers: int, chunks: int, virtual: int, replicas: int) -> Schedule:
    """Return ``schedule``, or the schedule of that name for these sizes; raises ScheduleError if it cannot run."""
    if isinstance(schedule, str):
        schedule = schedules.get(schedule, workers, chunks, virtual)
    if replicas > 1 and schedule.name in POLICIES:
        raise ScheduleError(
            f"{schedule.name!r} updates each replica's weights at its own times, so {replicas} replicas would part;"
            " use a synchronous schedule, for instance '1f1b', or replicas=1"
        )
    return schedule.validate()


def cut_layers(
    layers: OrderedDict[str, Layer], balance: str | Sequence[int], stages: int, measure: Callable[[], Any]
) -> list[int]:
    """Return the number of layers of each stage, as ``balance`` gives it or as equal in cost as possible.

    ``measure()`` profiles the layers; it is called for the balances "time" and "memory" alone. Raises PartitionError
    if the layers cannot be cut so, ArgumentError for an unknown ``balance``.
    """
    if len(layers) < stages:
        raise PartitionError(
            f"the model has {len(layers)} layers and the schedule {stages} stages; use fewer workers or split layers"
        )
    if isinstance(balance, str):
        require(balance in _BALANCES, f"balance must be layers per stage or one of {_BALANCES}, not {balance!r}")
        if balance == "parameters":
            sizes = partition.balance(parameter_counts(layers), stages)
        else:
            measured = measure()
            sizes = partition.balance(
                balancing_costs(measured, balance), stages, [layer.output_bytes for layer in measured]
            )
    else:
        sizes = partition.check_balance(balance, len(layers), stages)
    return sizes


def check_functions(loss: Any, optimizer: Any, dispatch: str, chunks: int) -> None:
    """Raise ArgumentError for a loss, optimizer, dispatch or number of micro-batches that cannot work."""
    require(callable(loss), f"loss must be callable as loss(output, target), not {loss!r}")
    require(callable(optimizer), f"optimizer must be a function of the parameters, not {optimizer!r}")
    require(dispatch in _DISPATCH, f"dispatch must be one of {_DISPATCH}, not {dispatch!r}")
    require(chunks >= 1, f"chunks must be at least 1, not {chunks}")


def check_training(
    nonfinite: str, flush_every: int | None, accumulate: int, autocast: torch.dtype | None, batch_norm: str
) -> None:
    """Raise ArgumentError for a wrong value of an option of training."""
    require(nonfinite in ("skip", "stop"), f"nonfinite must be 'skip' or 'stop', not {nonfinite!r}")
    require(flush_every is None or flush_every >= 1, f"flush_every must be at least 1, not {flush_every}")
    require(accumulate >= 1, f"accumulate must be at least 1, not {accumulate}")
    precision.check(autocast)
    require(batch_norm in MODES, f"batch_norm must be one of {MODES}, not {batch_norm!r}")


def check_ties(policy: str | None, ties: Sequence[Tie], layers: Sequence[str], sizes: Sequence[int]) -> None:
    """Raise ScheduleError if weights are tied across stages and ``policy`` lets every stage update on its own.

    ``policy`` is None for synchronous schedules. ``sizes``: the number of layers of each stage.
    """
    stage_of = {name: stage for stage, (names, _) in stage_parts(layers, sizes).items() for name in names}
    for tie in ties if policy is not None else ():
        stages = sorted({stage_of[holder.layer] for holder in tie.holders})
        if len(stages) > 1:
            raise ScheduleError(
                f"{' and '.join(holder.name for holder in tie.holders)} are one weight, on stages"
                f" {' and '.join(map(str, stages))}, which an asynchronous schedule lets update at their own times;"
                " use a synchronous one, for instance '1f1b', or keep these layers on one stage with balance=[…]"
            )


def pairs(batches: Iterable[Any], call: str) -> Iterator[tuple[Nest, Nest]]:
    """Yield each batch as (inputs, targets); raises ArgumentError for anything but a pair."""
    for batch in batches:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            about = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            about += f" with the keys {list(batch)}" if isinstance(batch, Mapping) else ""
            raise ArgumentError(
                f"pipe.{call} takes pairs (inputs, targets), and got a {type(batch).__name__}{about};"
                " make pairs of the batches, for instance ((batch, batch['labels']) for batch in loader)"
            )
        yield batch[0], batch[1]


def check_groups(groups: Sequence[Sequence[Any]]) -> None:
    """Raise ArgumentError if no worker has an optimizer, or if their numbers of parameter groups differ."""
    require(bool(groups), "no parameter of the model requires a gradient: there is nothing to train")
    require(
        len({len(group) for group in groups}) == 1,
        f"optimizer made {sorted({len(group) for group in groups})} parameter groups on different workers;"
        " return the same number of groups everywhere, empty ones too",
    )


def check_state(live: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless ``state`` has the names and shapes of ``live``, the model's state."""
    missing, extra = sorted(live.keys() - state.keys()), sorted(state.keys() - live.keys())
    wrong = [key for key in live.keys() & state.keys() if live[key].shape != state[key].shape]
    if missing or extra or wrong:
        raise CheckpointError(
            f"the state does not fit the model: missing {missing[:5]}, unexpected {extra[:5]}, wrong shape {wrong[:5]}"
        )
