"""``rp.plan``: measure or estimate a model's layers, then search for the fastest way to train it."""

from __future__ import annotations

import functools
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from rpcpipe.cluster.cluster import Cluster, Worker
from rpcpipe.errors import require, require_whole
from rpcpipe.model.layers import Layer, Model, named_layers, parameter_counts
from rpcpipe.model.microbatch import Nest, batch_size, split, tensors
from rpcpipe.planning import CostModel, LayerCost, partition
from rpcpipe.planning.cost_model import SIMPLEST, Machine
from rpcpipe.planning.layer_cost import balancing_costs, mean_costs
from rpcpipe.planning.plan import Plan, decide
from rpcpipe.planning.search import CHECKPOINTS, Search, layouts
from rpcpipe.stage.optimizer import Factory
from rpcpipe.stage.profiler import estimate, profile

# From the end of an action to the start of its consumer on another worker of one host, without CUDA
# (docs/design/transport.md, control cost), and what a byte adds.
_LATENCY, _BANDWIDTH = 1.2e-3, 3.5e9


def plan(
    model: nn.Sequential | Sequence[Layer],
    sample: Nest,
    workers: int | Cluster,
    *,
    memory: float | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    targets: Nest = None,
    optimizer: Factory | None = None,
    moments: int = 2,
    chunks: Sequence[int] | None = None,
    schedules: Sequence[str] = SIMPLEST,
    checkpoints: Sequence[str] = CHECKPOINTS,
    replicas: int | None = 1,
    flops: float | None = None,
    latency: float = _LATENCY,
    bandwidth: float = _BANDWIDTH,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Plan:
    """The fastest way to train ``model`` on ``workers`` for batches like ``sample``, within ``memory`` bytes a worker.

    The layers are run, with ``loss(output, targets)`` and the ``optimizer`` where given: on a cluster's
    workers at once, as in a step, or for a number of workers in this process on ``device``. With ``flops``,
    the operations a device does in a second, nothing runs: they are counted on the meta device. ``latency``
    in seconds and ``bandwidth`` in bytes a second are those between two workers; ``moments``: the optimizer's
    state in copies of the parameters (Adam's 2). ``chunks``: the numbers of micro-batches to try,
    ``replicas``: how many, or None to try all. Raises PartitionError where nothing fits, and says what would.
    """
    require(memory is None or memory > 0, f"memory must be positive, not {memory} bytes a worker")
    require(flops is None or flops > 0, f"flops must be positive, not {flops}")
    known = set(SIMPLEST)
    require(bool(schedules) and known.issuperset(schedules), f"schedules must be among {SIMPLEST}, not {schedules}")
    count = len(workers.workers) if isinstance(workers, Cluster) else require_whole("workers", workers)
    layers, size = named_layers(model), batch_size(sample)
    parts = _micro_batches(size, count, chunks)
    if flops is None:
        run = functools.partial(profile, loss=loss, optimizer=optimizer, seed=seed)
        call = _on(workers, device, run)
    else:
        call = functools.partial(estimate, flops=flops, loss=loss)
    layer_costs = {part: _profiled(call, layers, sample, targets, part) for part in parts}
    machine = Machine(
        count, math.inf if memory is None else memory, latency, bandwidth, _cores(workers, device, flops), moments
    )
    input_bytes = sum(leaf.nbytes for leaf in tensors(sample)) // size
    cost_model = CostModel(layer_costs, machine, input_bytes)
    return decide(Search(cost_model, size, schedules, layouts(count, len(layers), replicas), checkpoints))


def _micro_batches(size: int, workers: int, chunks: Sequence[int] | None) -> list[int]:
    """Sizes of micro-batches to profile, largest first."""
    wanted = [require_whole("chunks", count) for count in chunks or [workers * factor for factor in (1, 2, 4, 8)]]
    return sorted({-(-size // min(count, size)) for count in wanted}, reverse=True)


def _profiled(
    call: Callable[..., list[LayerCost]], layers: OrderedDict[str, Layer], sample: Nest, targets: Nest, size: int
) -> list[LayerCost]:
    count = -(-batch_size(sample) // size)
    part = split(sample, count)[0]
    return call(layers, part, target=None if targets is None else split(targets, count)[0])


def _on(workers: int | Cluster, device: torch.device | str, run: Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(workers, Cluster):
        return functools.partial(run, device=device)
    # All at once, as many as have a core: alone, a worker would have the memory's bandwidth to itself.
    cluster, busy = workers, workers.workers[: _cores(workers, device, None)]

    def there(layers: OrderedDict[str, Layer], part: Nest, target: Nest) -> list[LayerCost]:
        def on(worker: Worker) -> list[LayerCost]:
            found = cluster.call(worker, functools.partial(run, device=worker.device, target=target), layers, part)
            return list(found)

        with ThreadPoolExecutor(len(busy)) as pool:
            return mean_costs(list(pool.map(on, busy)))

    return there


def _cores(workers: int | Cluster, device: torch.device | str, flops: float | None) -> int | None:
    """Cores that all workers share: those of this host, if that is where and on what all compute."""
    if flops is not None:
        return None
    if isinstance(workers, Cluster):
        shared = len({worker.host for worker in workers.workers}) == 1
        return os.cpu_count() if shared and all(worker.device == "cpu" for worker in workers.workers) else None
    return os.cpu_count() if torch.device(device).type == "cpu" else None


def balance_by_parameters(model: Model, stages: int) -> list[int]:
    """The largest stage's parameters are as few as possible. Builds LayerSpecs on the meta device.

    Raises PartitionError if the model has fewer layers than ``stages``.
    """
    return partition.balance(parameter_counts(named_layers(model)), stages)


def balance_by_time(model: Model, stages: int, sample: Nest) -> list[int]:
    """The slowest stage's forward and backward are as short as possible; runs every layer here.

    ``sample``: one micro-batch of inputs. ``Pipeline(balance="time", sample=…)`` measures on a worker.
    """
    return _measured_cut(model, stages, sample, "time")


def balance_by_memory(model: Model, stages: int, sample: Nest) -> list[int]:
    """The largest stage's memory is as small as possible: seven times its parameters (gradient, Adam's
    moments, and the copy with which a failed step is taken back) and the activations of ``sample``,
    one micro-batch of inputs."""
    return _measured_cut(model, stages, sample, "memory")


def _measured_cut(model: Model, stages: int, sample: Nest, what: str) -> list[int]:
    measured = profile(named_layers(model), sample)
    return partition.balance(
        balancing_costs(measured, what), stages, communication=[layer.output_bytes for layer in measured]
    )
