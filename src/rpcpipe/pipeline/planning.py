"""Measure or estimate a model's layers, and search for the fastest plan or the best balanced cut."""

from __future__ import annotations

import functools
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from rpcpipe._arguments import require_callable, require_count, require_entries, require_kind, require_number
from rpcpipe._tables import parse_bytes
from rpcpipe.cluster import Cluster, Worker
from rpcpipe.cluster.tenancy import kept_apart
from rpcpipe.errors import ArgumentError, require, require_positive, require_whole, shown
from rpcpipe.model.layers import AnyModel, Layer, Model, named_layers, parameter_counts
from rpcpipe.model.microbatch import Nest, batch_size, split, tensors
from rpcpipe.model.nest_types import NestOfTensors
from rpcpipe.model.splitting import layers_for
from rpcpipe.pipeline.calibration import measure_overheads
from rpcpipe.planning import CostModel, LayerCost, partition
from rpcpipe.planning.cost_model import SIMPLEST
from rpcpipe.planning.layer_cost import UNDO, balancing_costs, mean_costs
from rpcpipe.planning.loss_cost import Healing, host_names
from rpcpipe.planning.machine import Machine
from rpcpipe.planning.overheads import Overheads
from rpcpipe.planning.plan import Plan, decide
from rpcpipe.planning.search import CHECKPOINTS, Search, layouts
from rpcpipe.stage import precision
from rpcpipe.stage.optimizer import Factory
from rpcpipe.stage.profiler import estimate, profile

# Seconds and bytes per second from one worker to another of the same host, without CUDA, where nothing was measured.
_LATENCY, _BANDWIDTH = 0.4e-3, 3.5e9
_MOST_WORKERS = 1 << 16


def plan(
    model: AnyModel,
    sample: NestOfTensors,
    workers: int | Cluster,
    *,
    memory: float | str | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    targets: NestOfTensors = None,
    optimizer: Factory | None = None,
    moments: int = 2,
    chunks: Sequence[int] | None = None,
    schedules: Sequence[str] = SIMPLEST,
    checkpoints: Sequence[str] = CHECKPOINTS,
    replicas: int | None = 1,
    flops: float | None = None,
    latency: float | None = None,
    bandwidth: float | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    autocast: torch.dtype | None = None,
    undo: str | None = None,
    hosts: int | None = None,
) -> Plan:
    """Return the fastest plan to train ``model`` on ``workers`` with batches like ``sample``.

    The layers are run, with ``loss(output, targets)`` and ``optimizer`` if given: on all workers of a cluster at once,
    as in a step, or, if ``workers`` is a number, in this process on ``device``. With ``flops``, the operations per
    second of a device, no layer is run: operations are counted on the meta device.

    ``memory``: bytes that a worker may use, or text such as "80GiB"; None for any. ``latency`` (seconds) and
    ``bandwidth`` (bytes per second) are those between two workers; None: what a few steps of a small model show on a
    cluster, beside what they show of the driver's and the workers' other work, and else those of processes of one host.
    ``moments``: the size of the optimizer's state in copies of the parameters, 2 for Adam; where layers are run with
    ``optimizer``, its own counts.
    ``chunks``, ``schedules`` and ``checkpoints``: the numbers of micro-batches, the schedules and the modes of
    recomputation to try. ``replicas``: the number of replicas, or None to try every number. ``seed``: of the profiled
    layers' random numbers. ``autocast``: in which the pipeline will run. ``undo``: "copy", "off", or None for "copy"
    where a plan with it fits and else "off". ``hosts``: over how many hosts the workers are spread, since snapshots for
    the loss of one take memory; None: a cluster's own, and one where ``workers`` is a number.

    Raises PartitionError, which says what would fit, if nothing fits, and ArgumentError for a wrong argument.
    """
    if isinstance(memory, str):
        memory = _bytes("memory", memory)
    if memory is not None:
        memory = require_positive("memory", memory, ', or text such as "80GiB", or None')
    if replicas is not None:
        require_whole("replicas", replicas, otherwise=", or None to try all")
    require_entries("schedules", schedules, SIMPLEST)
    require_entries("checkpoints", checkpoints, CHECKPOINTS)
    require(undo is None or undo in UNDO, f"undo must be one of {UNDO}, or None, not {shown(undo)}")
    costs = cost_model(
        model, sample, workers, memory=memory, loss=loss, targets=targets, optimizer=optimizer, moments=moments,
        chunks=chunks, flops=flops, latency=latency, bandwidth=bandwidth, device=device, seed=seed,
        autocast=autocast, hosts=hosts,
    )  # fmt: skip
    rows = layouts(costs.machine.workers, costs.layers, replicas)
    return decide(Search(costs, batch_size(sample), schedules, rows, checkpoints), undo)


def _bytes(name: str, text: str) -> float:
    try:
        return parse_bytes(text)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error}") from None


def cost_model(
    model: AnyModel,
    sample: NestOfTensors,
    workers: int | Cluster,
    *,
    memory: float | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    targets: NestOfTensors = None,
    optimizer: Factory | None = None,
    moments: int = 2,
    chunks: Sequence[int] | None = None,
    flops: float | None = None,
    latency: float | None = None,
    bandwidth: float | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    autocast: torch.dtype | None = None,
    hosts: int | None = None,
    timed: bool = True,
) -> CostModel:
    """Measure or estimate what ``plan``, which has the same arguments, chooses by.

    Without ``timed`` only bytes are wanted, and what a cluster's steps take beside their layers is not measured.
    """
    _check_measuring(loss, optimizer, moments, flops, latency, bandwidth, seed)
    precision.check(autocast)
    require(
        autocast is None or flops is None,
        f"autocast={autocast!r} is measured by running layers, which flops={flops!r} leaves out: give layers of that"
        " dtype, or leave one of the two out",
    )
    count = len(workers.workers) if isinstance(workers, Cluster) else require_count("workers", workers, _MOST_WORKERS)
    device = _device(device)
    size = _size("sample", sample)
    layers = layers_for(model, sample)
    if targets is not None:
        _size("targets", targets)
    parts = _micro_batches(size, count, chunks)
    if flops is None:
        run = functools.partial(profile, loss=loss, optimizer=optimizer, seed=seed, autocast=autocast)
        measure = _measure_on(workers, device, run)
    else:
        measure = functools.partial(estimate, flops=flops, loss=loss)
    layer_costs = {part: _costs_of_size(measure, layers, sample, targets, part) for part in parts}
    machine = _machine(workers, device, flops, latency, bandwidth) if timed else Machine(count)
    heals = _heals(workers, device)
    machine = replace(
        machine, memory=math.inf if memory is None else memory, moments=moments,
        healing=Healing(heals, _hosts(workers, hosts, heals)),
    )  # fmt: skip
    return CostModel(layer_costs, machine, input_bytes=sum(leaf.nbytes for leaf in tensors(sample)) // size)


def _check_measuring(
    loss: Any, optimizer: Any, moments: Any, flops: Any, latency: Any, bandwidth: Any, seed: Any
) -> None:
    """Raise ArgumentError for a value of a wrong kind of what ``cost_model`` measures with."""
    for name, function in (("loss", loss), ("optimizer", optimizer)):
        if function is not None:
            require_callable(name, function, "or None")
    require_whole("moments", moments, least=0)
    require_whole("seed", seed, least=-math.inf)
    if flops is not None:
        require_positive("flops", flops, ", or None", finite=True)
    if latency is not None:
        require_number("latency", latency, least=0, otherwise=", or None")
    if bandwidth is not None:
        require_positive("bandwidth", bandwidth, ", or None")


def _size(name: str, nest: Nest) -> int:
    """Return the batch size of argument ``name``; raises ArgumentError if it has none."""
    try:
        return batch_size(nest)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error}") from None


def _device(device: Any) -> torch.device:
    """Return argument ``device`` as a device of this process; raises ArgumentError for anything else."""
    try:
        if isinstance(device, (str, torch.device)):
            torch.empty(0, device=device)
            return torch.device(device)
    except RuntimeError:
        pass
    raise ArgumentError(f"device must be a device of this process, such as 'cpu' or 'cuda:0', not {shown(device)}")


def _machine(
    workers: int | Cluster,
    device: torch.device | str,
    flops: float | None,
    latency: float | None,
    bandwidth: float | None,
) -> Machine:
    """Return the workers as a Machine; on a cluster what is not given is measured, unless ``flops`` are."""
    cores, between, overheads = _cores(workers, device, flops), _LATENCY, Overheads()
    count = len(workers.workers) if isinstance(workers, Cluster) else workers
    if isinstance(workers, Cluster) and flops is None:
        overheads, between = measure_overheads(workers, spare_core=cores is None or cores > count)
        if bandwidth is not None:
            overheads = replace(overheads, copy=0.0)
    return Machine(
        count, latency=between if latency is None else latency, bandwidth=bandwidth or _BANDWIDTH, cores=cores,
        overheads=overheads,
    )  # fmt: skip


def _heals(workers: int | Cluster, device: torch.device) -> bool:
    """Return whether workers that die are replaced: those on the CPU are, unless a cluster says otherwise."""
    if isinstance(workers, Cluster):
        return workers.heal > 0 and all(worker.device == "cpu" for worker in workers.workers)
    return device.type == "cpu"


def _hosts(workers: int | Cluster, hosts: int | None, heals: bool) -> tuple[str, ...]:
    """Return the host of every worker where snapshots are taken for the loss of one, else ().

    ``hosts``: how many there are, of which each has its share of the workers. ``heals``: whether the workers of a
    cluster are replaced.
    """
    if isinstance(workers, Cluster) and hosts is None:
        names = [worker.name for worker in workers.workers]
        found = kept_apart(workers, names) if workers.spread and heals else []
        return tuple(found) if len(set(found)) > 1 else ()
    count = len(workers.workers) if isinstance(workers, Cluster) else workers
    return host_names(count, 1 if hosts is None else require_count("hosts", hosts, count))


def _micro_batches(size: int, workers: int, chunks: Sequence[int] | None) -> list[int]:
    """Return the sizes of micro-batches to profile, in samples, largest first."""
    if chunks is None:
        chunks = [workers * factor for factor in (1, 2, 4, 8)]
    require_kind("chunks", chunks, Sequence, "a list of numbers of micro-batches, or None")
    counts = [require_whole("chunks", count, otherwise=" each") for count in chunks]
    require(bool(counts), "chunks must be a list of one or more numbers of micro-batches, or None, not []")
    return sorted({-(-size // min(count, size)) for count in counts}, reverse=True)


def _costs_of_size(
    measure: Callable[..., list[LayerCost]], layers: OrderedDict[str, Layer], sample: Nest, targets: Nest, size: int
) -> list[LayerCost]:
    """Return every layer's costs for a micro-batch of ``size`` samples."""
    count = -(-batch_size(sample) // size)
    part = split(sample, count)[0]
    return measure(layers, part, target=None if targets is None else split(targets, count)[0])


def _measure_on(workers: int | Cluster, device: torch.device | str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of (layers, part, target) that profiles with ``run``, on the cluster's workers or here."""
    if not isinstance(workers, Cluster):
        return functools.partial(run, device=device)
    # As many workers at once as there are cores: one alone would have the memory's whole bandwidth.
    cluster, busy = workers, workers.workers[: _cores(workers, device, None)]

    def measure_on_all(layers: OrderedDict[str, Layer], part: Nest, target: Nest) -> list[LayerCost]:
        def measure_on(worker: Worker) -> list[LayerCost]:
            return list(cluster.call(worker, functools.partial(run, device=worker.device, target=target), layers, part))

        with ThreadPoolExecutor(len(busy)) as pool:
            return mean_costs(list(pool.map(measure_on, busy)))

    return measure_on_all


def _cores(workers: int | Cluster, device: torch.device | str, flops: float | None) -> int | None:
    """Return the number of cores that all workers share; None unless they compute on the CPU of one host."""
    if flops is not None:
        return None
    if isinstance(workers, Cluster):
        shared = len({worker.host for worker in workers.workers}) == 1
        return os.cpu_count() if shared and all(worker.device == "cpu" for worker in workers.workers) else None
    return os.cpu_count() if torch.device(device).type == "cpu" else None


def balance_by_parameters(model: Model, stages: int) -> list[int]:
    """Return the number of layers of each stage, so that the largest stage has as few parameters as possible.

    LayerSpecs are built on the meta device. Raises PartitionError if the model has fewer layers than ``stages``.
    """
    layers = named_layers(model)
    return partition.balance(parameter_counts(layers), require_whole("stages", stages))


def balance_by_time(model: AnyModel, stages: int, sample: NestOfTensors) -> list[int]:
    """Return the number of layers of each stage, so that the slowest stage's forward and backward are fastest.

    Every layer is run in this process with ``sample``, one micro-batch of inputs; ``Pipeline(balance="time",
    sample=…)`` measures on a worker instead. Raises PartitionError if the model has fewer layers than ``stages``.
    """
    return _measured_cut(model, stages, sample, "time")


def balance_by_memory(model: AnyModel, stages: int, sample: NestOfTensors) -> list[int]:
    """Return the number of layers of each stage, so that the largest stage's memory is as small as possible.

    A stage's memory is seven times its parameters (weights, gradient, Adam's two moments, and the copy of weights and
    moments from which a failed step is rolled back) and its activations for ``sample``, one micro-batch of inputs,
    with which every layer is run in this process. Raises PartitionError if the model has fewer layers than ``stages``.
    """
    return _measured_cut(model, stages, sample, "memory")


def _measured_cut(model: AnyModel, stages: int, sample: Nest, balance: str) -> list[int]:
    """Return the number of layers of each stage, balanced by "time" or "memory"."""
    stages = require_whole("stages", stages)
    if not tensors(sample):
        raise ArgumentError(f"sample must be one micro-batch of inputs, with tensors, not {shown(sample)}")
    layers = layers_for(model, sample)
    layer_costs = profile(layers, sample)
    return partition.balance(
        balancing_costs(layer_costs, balance), stages, communication=[layer.output_bytes for layer in layer_costs]
    )
