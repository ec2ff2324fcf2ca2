"""Bring a pipeline's layers to its workers, and move them when its schedule changes in a live run."""

from __future__ import annotations

import dataclasses
import functools
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rpcpipe import schedules
from rpcpipe.cluster.tenancy import PipelineCluster
from rpcpipe.driver.deployment import Deployment
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.history import History
from rpcpipe.driver.replies import raise_failure, raise_loss
from rpcpipe.driver.runtime import Runtime, release
from rpcpipe.driver.succession import healed
from rpcpipe.errors import (
    ArgumentError,
    ModelError,
    ScheduleError,
    StageError,
    StateError,
    WorkerLost,
    require,
    require_whole,
    shown,
)
from rpcpipe.model import losses
from rpcpipe.model.containers import check_global_hooks, shared_buffers
from rpcpipe.model.layers import Layer, check_embeddings, check_names, find_ties, unpicklable, unwired, wiring_of
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.torch_settings import TorchSettings
from rpcpipe.pipeline.arguments import (
    Options,
    check_groups,
    check_settings,
    check_ties,
    cut_layers,
    layout_of,
    make_schedule,
)
from rpcpipe.planning import LayerCost, partition
from rpcpipe.schedules import Schedule, weight_versions
from rpcpipe.stage import precision
from rpcpipe.stage.profiler import profile
from rpcpipe.transport import user_pickling
from rpcpipe.transport.user_pickling import named_dumps
from rpcpipe.worker.actor_spec import ActorSpec, Parts
from rpcpipe.worker.gradient_exchange import ReplicaGroup
from rpcpipe.worker.messages import StageInfo
from rpcpipe.worker.operations import GetOptimizerState, ReceiveLayers, ReleaseLayers, Repartition


def start(layers: OrderedDict[str, Layer], cluster: PipelineCluster, options: Options) -> Runtime:
    """Cut ``layers`` into stages, build these on their workers, and return the pipeline's Runtime.

    If a worker dies meanwhile, all is built again. Raises ArgumentError, ModelError, ScheduleError or PartitionError
    before any worker is asked to build a stage, StageError for a layer or optimizer that fails on its worker, and
    WorkerLost.
    """
    if not all(hasattr(cluster, name) for name in ("workers", "transport", "check")):
        raise ArgumentError(f"cluster must be the Cluster that rp.launch or rp.connect returns, not {shown(cluster)}")
    cluster.check()
    return healed(
        cluster,
        cluster.check,
        lambda: _start(layers, cluster, options),
        after="There is no pipeline: nothing was built",
    )


def _start(layers: OrderedDict[str, Layer], cluster: PipelineCluster, options: Options) -> Runtime:
    layout = layout_of(cluster, options.schedule, options.balance, options.virtual_stages, options.replicas)
    trains = options.optimizer is not None
    schedule = make_schedule(
        options.schedule, layout.pipeline_size, options.chunks, options.virtual_stages, options.replicas, trains=trains
    )
    policy = weight_versions.choose(schedule.name, options.weights)
    scaler = precision.loss_scaler(options.autocast) if trains else None
    options.settings.check(policy, scaled=scaler is not None)
    check_global_hooks()
    seed = options.seed
    for name, layer in layers.items():
        if isinstance(module := unwired(layer), nn.Module):
            check_embeddings(name, module)
    buffers = shared_buffers({name: unwired(layer) for name, layer in layers.items()})
    ties, wirings = find_ties(layers), {name: wiring_of(layer) for name, layer in layers.items()}
    measured = functools.partial(measure, cluster, layers, options.sample, seed, options.autocast)
    sizes = cut_layers(layers, options.balance, schedule.stages, measured, options.undo)
    check_ties(policy, ties, list(layers), sizes)
    deployment = Deployment(layout, schedule, sizes, wirings, ties, options.shard_optimizer)
    identity = uuid.uuid4().hex
    batched = options.dispatch == "batched"
    driver = Driver(cluster.transport, identity, layout.names, timeout=cluster.timeout, batched=batched)
    prepare = functools.partial(losses.prepared, options.loss)
    runtime = Runtime(cluster, driver, deployment, options.settings, policy=policy, prepare=prepare, scaler=scaler)
    runtime.spec = ActorSpec(
        stages={}, last_stage=schedule.stages - 1, loss=options.loss or _no_loss, optimizer=options.optimizer,
        seed=seed, checkpoint=options.checkpoint, autocast=options.autocast, batch_norm=options.batch_norm,
        wirings=wirings, ties=ties, stage_links=deployment.stage_links, shared_buffers=buffers,
        settings=TorchSettings.current(), copies=options.undo == "copy", keep=cluster.heal > 0,
    )  # fmt: skip
    watch(runtime)
    try:
        _create(runtime, identity, layers)
    except BaseException:
        runtime.close()
        raise
    runtime.history.tick()
    return runtime


def watch(runtime: Runtime) -> None:
    """Let the cluster know of a pipeline, and free its stages when it is gone."""
    runtime.history = History(runtime)
    runtime.cluster.pipelines.add(runtime)
    # In a REPL a pipeline is often replaced without being closed.
    weakref.finalize(runtime, release, runtime.cluster, runtime.driver).atexit = False


def measure(
    cluster: PipelineCluster, layers: OrderedDict[str, Layer], sample: Nest, seed: int, autocast: torch.dtype | None
) -> list[LayerCost]:
    """Return every layer's costs on the first worker for ``sample``, one micro-batch of inputs, under ``autocast``.

    Raises ArgumentError if there is no sample, ModelError for layers that cannot be sent, and StageError for a layer
    that fails.
    """
    require(
        sample is not None, "balance='time' or 'memory' needs sample=…: one micro-batch of inputs to run the layers on"
    )
    first = cluster.workers[0]
    try:
        measured = functools.partial(profile, seed=seed, device=first.device, autocast=autocast)
        return list(cluster.call(first, TorchSettings.current().around(measured), layers, sample))
    except ArgumentError as error:
        if isinstance(error, StageError):
            raise
        raise unpicklable(layers, error) from error


def _no_loss(output: Nest, target: Nest) -> None:
    """Stand for the loss of a pipeline that only infers, which never computes it."""
    raise AssertionError("evaluate is refused without a loss")


def _create(runtime: Runtime, identity: str, layers: OrderedDict[str, Layer]) -> None:
    """Build the stages on all workers; only one worker's layers are held in pickled form at a time."""
    # Only for its warning and its refusal: they are sent with the layers.
    for what, function in ("loss", runtime.spec.loss), ("optimizer", runtime.spec.optimizer):
        named_dumps(function, what, error=ModelError)
    deployment = runtime.deployment
    infos = create_actors(
        runtime,
        identity,
        lambda name: {
            stage: (OrderedDict((key, layers[key]) for key in keys), first)
            for stage, (keys, first) in deployment.parts_on(name).items()
        },
    )
    runtime.install(deployment, infos)
    runtime.succession.begin(infos)
    # Of specs' layers the names are known only now.
    tied = {holder.name for tie in deployment.ties for holder in tie.holders}
    owned = ((f"of stage {stage.index}", name) for stage in runtime.stages for name in stage.trainable)
    check_names((stage, name, "a tied weight" if name in tied else stage) for stage, name in owned)
    if runtime.settings.trains:
        runtime.make_optimizer(check_groups({worker: list(stages.values()) for worker, stages in infos.items()}))


def create_actors(
    runtime: Runtime, identity: str, stages_on: Callable[[str], Parts]
) -> dict[str, dict[int, StageInfo]]:
    """Build an actor on each worker, with the stages that ``stages_on`` returns for it; return their descriptions."""
    deployment, replies = runtime.deployment, {}
    for name in runtime.names:
        worker, replica = deployment.layout.index(name)
        peers = ReplicaGroup(deployment.layout.replicas_of(worker), replica, deployment.shard)
        spec = _pickled(dataclasses.replace(runtime.spec, stages=stages_on(name), peers=peers))
        replies[name] = runtime.cluster.transport.call(name, "create", identity, spec)
    try:
        return runtime.driver.collect(replies)
    except WorkerLost:
        runtime.driver.outcomes(replies)  # what drops the others' stages must not overtake what builds them
        raise


def _pickled(spec: ActorSpec) -> bytes:
    """Return ``spec`` pickled; raises ModelError with the layer that cannot be."""
    try:
        return user_pickling.dumps(spec)
    except Exception as error:
        layers = {name: layer for named, _ in spec.stages.values() for name, layer in named.items()}
        raise unpicklable(layers, error) from error


def change_schedule(runtime: Runtime, wanted: str | Schedule) -> None:
    """Switch to another schedule, given by name or as a Schedule, and move the layers that it places elsewhere.

    Raises StateError, ArgumentError or ScheduleError, before anything changes, for a schedule that does not fit.
    """
    require(runtime.active is None, "the schedule cannot change inside a step", error=StateError)
    require(
        isinstance(wanted, (str, Schedule)),
        f"schedule must be one of {', '.join(schedules.names())}, or a Schedule, not {wanted!r}",
    )
    before, settings = runtime.deployment, runtime.settings
    virtual = settings.virtual_stages
    if isinstance(wanted, str):
        virtual = schedules.suited_virtual_stages(wanted, virtual)
    workers = before.layout.pipeline_size
    new = make_schedule(wanted, workers, runtime.chunks, virtual, before.layout.replicas, trains=settings.trains)
    require(new.workers == workers, f"{new.name!r} is for {new.workers} workers, not {workers}", error=ScheduleError)
    policy = weight_versions.choose(new.name, settings.weights if new.name == before.schedule.name else None)
    runtime.check_policy(policy)
    balance = before.balance
    if new.stages != before.schedule.stages:
        balance = balanced(runtime, new.stages)
    check_ties(policy, before.ties, before.layers, balance)
    after = dataclasses.replace(before, schedule=new, balance=balance)
    runtime.history.cut()
    if new.placement == before.schedule.placement:
        runtime.install(after)
    else:
        _move(runtime, after)
    runtime.policy = policy
    runtime.note_event("schedule", f"{before.schedule.name} → {new.name}")
    runtime.history.tick()


def balanced(runtime: Runtime, stages: int) -> list[int]:
    """Return the number of layers of each of ``stages`` stages, with parameters as equal as possible."""
    sizes = {layer: count for stage in runtime.stages for layer, count in stage.sizes.items()}
    return partition.balance([sizes[layer] for layer in runtime.deployment.layers], stages)


def change_chunks(runtime: Runtime, chunks: int) -> None:
    """Go on with another number of micro-batches; refusals leave everything as it was."""
    chunks, schedule = require_whole("chunks", chunks), runtime.schedule
    virtual = schedule.stages // schedule.workers
    if schedule.name not in schedules.names() or schedule != schedules.get(
        schedule.name, schedule.workers, schedule.chunks, virtual
    ):
        raise ScheduleError(
            f"{schedule.name!r} is a Schedule of your own, which brings its {schedule.chunks} micro-batches: set"
            f" pipe.schedule to one of {chunks} micro-batches, or to a name of rp.schedules.names()"
        )
    change_schedule(runtime, schedules.get(schedule.name, schedule.workers, chunks, virtual))


def change_settings(runtime: Runtime, **wanted: Any) -> None:
    """Train with other settings from now on; refusals leave them as they were."""
    changed = check_settings(dataclasses.replace(runtime.settings, **wanted))
    changed.check(runtime.policy, scaled=runtime.scaler is not None)
    runtime.settings = changed


def _move(runtime: Runtime, after: Deployment) -> None:
    """Move every layer, with its optimizer state, to the worker that holds it in ``after``.

    A layer that cannot be pickled, or unpickled, is refused before any worker lets go of one. A later error closes the
    pipeline, because layers that have left one worker may not have reached the other. A worker that dies is no error:
    its successor has all of the old stages or all of the new ones, and rebuilds them from the same layers again.
    """
    states, given = runtime.healed(lambda: (_sharded_states(runtime), _moving(runtime, after)))
    runtime.healed(
        lambda: runtime.driver.collect(
            {name: runtime.driver.call(name, ReceiveLayers(blobs)) for name, blobs in given.items()}
        )
    )
    infos: dict[str, dict[int, StageInfo]] = {}
    successors: set[str] = set()

    def rebuild() -> None:
        replies = {}
        for name in runtime.names:
            if name not in infos:
                before = ReceiveLayers(given[name]) if name in successors else None
                replies[name] = runtime.driver.call(name, repartition(after, name, states), before)
        outcomes = runtime.driver.outcomes(replies)
        infos.update({name: done for name, done in outcomes.items() if isinstance(done, dict)})
        raise_failure(outcomes.values())
        raise_loss(outcomes.values())

    def mend() -> None:
        runtime.mend()
        successors.update(runtime.names)

    try:
        healed(runtime.cluster, mend, rebuild, after="Some layers have moved, and some have not")
        if runtime.settings.trains:
            check_groups({name: list(infos[name].values()) for name in runtime.names})
        runtime.install(after, infos)
    except BaseException:
        runtime.close()
        raise


def _moving(runtime: Runtime, after: Deployment) -> dict[str, list[bytes]]:
    """Return by worker the pickled layers that other workers have and that it has in ``after``."""
    moves: dict[tuple[str, str], list[str]] = {}
    for old, new in zip(runtime.deployment.owners(), after.owners(), strict=True):
        for layer in after.layers:
            if old[layer] != new[layer]:
                moves.setdefault((old[layer], new[layer]), []).append(layer)
    given: dict[str, list[bytes]] = {name: [] for name in runtime.names}
    for (source, target), moving in moves.items():
        given[target].append(runtime.driver.control(source, ReleaseLayers(moving)))
    return given


def repartition(after: Deployment, worker: str, states: Mapping[str, dict[str, Any]]) -> Repartition:
    """Return the operation that gives ``worker`` its stages in ``after``; ``states``: by layer, optimizers' state."""
    parts = after.parts_on(worker)
    own = {layer: states[layer] for layers, _ in parts.values() for layer in layers if layer in states}
    return Repartition(parts, after.schedule.stages - 1, after.stage_links, own)


def _sharded_states(runtime: Runtime) -> Mapping[str, dict[str, Any]]:
    """Return the optimizer's whole state by layer, if replicas share it; nothing otherwise.

    Which replica owns a parameter's state changes with the stages, so every worker gets the whole state.
    """
    return optimizer_states(runtime) if runtime.deployment.shard else {}


def optimizer_states(runtime: Runtime) -> dict[str, dict[str, Any]]:
    """Return the optimizers' state by layer and parameter, of all workers together."""
    driver, states = runtime.driver, dict[str, dict[str, Any]]()
    for part in driver.collect({name: driver.call(name, GetOptimizerState()) for name in runtime.names}).values():
        for layer, state in part.items():
            states.setdefault(layer, {}).update(state)
    return states
