"""What the workers of a pipeline will hold, before there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from rpcpipe import schedules
from rpcpipe.cluster import Cluster
from rpcpipe.errors import PartitionError, require, require_whole, shown
from rpcpipe.model.layers import AnyModel
from rpcpipe.model.microbatch import batch_size
from rpcpipe.model.nest_types import NestOfTensors
from rpcpipe.model.splitting import layers_for
from rpcpipe.pipeline.arguments import cut_layers
from rpcpipe.pipeline.planning import cost_model
from rpcpipe.planning.cost_model import Candidate
from rpcpipe.planning.layer_cost import UNDO
from rpcpipe.planning.search import CHECKPOINTS
from rpcpipe.planning.worker_memory import WorkerMemory
from rpcpipe.schedules.weight_versions import choose
from rpcpipe.stage.optimizer import Factory


def predict_memory(
    model: AnyModel,
    sample: NestOfTensors,
    workers: int | Cluster,
    *,
    schedule: str = "1f1b",
    chunks: int = 8,
    balance: str | Sequence[int] = "parameters",
    virtual_stages: int = 1,
    checkpoint: str = "never",
    undo: str = "copy",
    weights: str | None = None,
    replicas: int = 1,
    shard_optimizer: bool = False,
    loss: Callable[[Any, Any], Any] | None = None,
    targets: NestOfTensors = None,
    optimizer: Factory | None = None,
    moments: int = 2,
    flops: float | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    autocast: torch.dtype | None = None,
    hosts: int | None = None,
) -> tuple[WorkerMemory, ...]:
    """Return what each worker of a replica would hold at its peak with batches like ``sample``, part by part, in bytes.

    The arguments up to ``shard_optimizer`` are those of ``Pipeline``, also of asynchronous schedules, which no plan
    chooses; the others, and ``workers``, are those of ``plan``, by which layers are measured or counted.

    Raises ScheduleError and PartitionError where there is no such schedule or cut, and ArgumentError for a wrong
    argument.
    """
    require(checkpoint in CHECKPOINTS, f"checkpoint must be one of {CHECKPOINTS}, not {shown(checkpoint)}")
    require(undo in UNDO, f"undo must be one of {UNDO}, not {shown(undo)}")
    policy = choose(schedule, weights)
    require(policy is None or (undo, replicas) == ("copy", 1), f"{schedule!r} needs undo='copy' and replicas=1")
    chunks, replicas = require_whole("chunks", chunks), require_whole("replicas", replicas)
    layers = layers_for(model, sample)
    costs = cost_model(
        model, sample, workers, loss=loss, targets=targets, optimizer=optimizer, moments=moments,
        chunks=[chunks * replicas], flops=flops, device=device, seed=seed, autocast=autocast, hosts=hosts, timed=False,
    )  # fmt: skip
    (micro_batch,) = costs.sums
    count = costs.machine.workers
    require(replicas <= count, f"{count} workers make no {replicas} replicas", error=PartitionError)
    candidate = Candidate(
        schedule=schedule, depth=count // replicas, replicas=replicas,
        virtual_stages=schedules.virtual_stages_of(schedule, virtual_stages), micro_batch=micro_batch,
        chunks=min(chunks, batch_size(sample) // replicas), checkpoint=checkpoint, undo=undo, weights=weights,
        sharded=shard_optimizer and replicas > 1,
    )  # fmt: skip
    sizes = cut_layers(layers, balance, candidate.stages, lambda: costs.layer_costs[micro_batch], undo)
    return costs.parts(candidate, [0, *accumulate(sizes)])
