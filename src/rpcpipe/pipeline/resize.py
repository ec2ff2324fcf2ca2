"""Go on with the same training over other workers: more, fewer, or cut in another way.

The layers, with what the optimizer knows of them, travel from the workers that hold them to new actors. The old ones
stay as they are until all new ones stand, so a refusal, an error or a death on the way changes nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Mapping, Sequence

from rpcpipe import schedules
from rpcpipe.driver.deployment import Deployment
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.layout import Layout
from rpcpipe.driver.runtime import Runtime
from rpcpipe.errors import ArgumentError, PartitionError, ScheduleError, StateError, require, require_whole
from rpcpipe.pipeline.arguments import Options, check_balance, check_groups, check_ties, layout_of, make_schedule
from rpcpipe.pipeline.deploy import balanced, create_actors, optimizer_states, repartition, watch
from rpcpipe.planning import partition
from rpcpipe.schedules import weight_versions
from rpcpipe.worker.messages import StageInfo
from rpcpipe.worker.operations import ReceiveLayers, ReleaseLayers

log = logging.getLogger("rpcpipe")


def wanted(options: Options, runtime: Runtime, balance: str | Sequence[int], replicas: int | None) -> Options:
    """Return the options of a pipeline, made with ``options``, as they have become, with another cut."""
    check_balance(balance)
    schedule, settings = runtime.schedule, runtime.settings
    own = schedule.name not in schedules.names()
    return dataclasses.replace(
        options, schedule=schedule if own else schedule.name, chunks=schedule.chunks, balance=balance,
        virtual_stages=schedule.stages // schedule.workers, weights=settings.weights,
        replicas=options.replicas if replicas is None else require_whole("replicas", replicas),
    )  # fmt: skip


def resized(old: Runtime, options: Options, workers: Layout | int | None) -> Runtime:
    """Return a runtime that goes on where ``old`` is, over other workers.

    ``workers``: these, so many of the cluster's first ones, None for all. ``options`` say how to cut. Raises
    StateError within a step or an accumulation, and ArgumentError, ScheduleError or PartitionError for what does not
    fit, before anything moves.
    """
    old.check_no_step("resize")
    old.check_accumulated("resize")
    deployment = _deployment(old, options, workers)
    policy = weight_versions.choose(deployment.schedule.name, options.weights)
    old.check_policy(policy)
    check_ties(policy, deployment.ties, deployment.layers, deployment.balance)
    settings = dataclasses.replace(old.settings, virtual_stages=options.virtual_stages, undo=options.undo)
    names, cluster, identity = deployment.layout.names, old.cluster, uuid.uuid4().hex
    batched = options.dispatch == "batched"
    driver = Driver(cluster.transport, identity, names, timeout=cluster.timeout, batched=batched)
    new = Runtime(
        cluster, driver, deployment, settings, policy=policy, prepare=old.prepare, scaler=old.scaler, turn=old.turn
    )
    new.spec = dataclasses.replace(
        old.spec,
        last_stage=deployment.schedule.stages - 1,
        checkpoint=options.checkpoint,
        copies=options.undo == "copy",
        stage_links=deployment.stage_links,
    )
    watch(new)
    try:
        _fill(old, new, identity)
    except BaseException:
        new.close()
        raise
    _hand_over(old, new)
    return new


def settled(old: Runtime, options: Options) -> Runtime:
    """Return a runtime over the workers that do not stand in for those of lost hosts; ``old`` if there is none.

    Stand-ins that no pipeline uses any more are ended. ``options``: those that the pipeline was made with.
    """
    cluster, standing = old.cluster, {worker.name for worker in old.cluster.stand_ins}
    if old.closed or old.progress.done or standing.isdisjoint(old.names):
        return old
    others = [worker.name for worker in cluster.workers if worker.name not in standing]
    own = wanted(options, old, "parameters", None)
    old.check()
    try:
        require(len(others) >= own.replicas, f"too few workers for replicas={own.replicas} are left", error=StateError)
        layout = Layout(tuple(others[: len(others) // own.replicas * own.replicas]), own.replicas)
        new = old.healed(lambda: resized(old, own, layout))
    except (ArgumentError, PartitionError, ScheduleError, StateError) as error:
        log.warning("%s stay on the driver's host, for the model cannot go on without: %s", sorted(standing), error)
        return old
    if idle := [worker for worker in cluster.stand_ins if not cluster.stages_on(worker.name)]:
        cluster.remove_workers(*idle)
    log.warning("the model goes on over %d workers", len(new.names))
    return new


def _deployment(old: Runtime, options: Options, workers: Layout | int | None) -> Deployment:
    before, layout = old.deployment, _layout(old, options, workers)
    virtual = options.virtual_stages
    if isinstance(options.schedule, str):
        virtual = schedules.suited_virtual_stages(options.schedule, virtual)
    schedule = make_schedule(
        options.schedule, layout.pipeline_size, options.chunks, virtual, options.replicas, trains=old.settings.trains
    )
    balance = options.balance
    if isinstance(balance, str):
        require(
            balance == "parameters",
            f"balance={balance!r} measures layers here, and they are on the workers: pass the number of layers of each"
            " stage, a plan of rp.plan, or balance='parameters'",
        )
        balance = balanced(old, schedule.stages)
    balance = partition.check_balance(balance, len(before.layers), schedule.stages)
    return Deployment(layout, schedule, balance, before.wirings, before.ties, options.shard_optimizer)


def _layout(old: Runtime, options: Options, workers: Layout | int | None) -> Layout:
    given = options.schedule, options.balance, options.virtual_stages, options.replicas
    if workers is None:
        return layout_of(old.cluster, *given)
    if isinstance(workers, Layout):
        return workers
    count, known = require_whole("workers", workers), old.cluster.workers
    require(
        count <= len(known) and count % options.replicas == 0,
        f"workers={count} must be a multiple of replicas={options.replicas}, and at most the cluster's {len(known)}",
        error=PartitionError,
    )
    return Layout(tuple(worker.name for worker in known[:count]), options.replicas)


def _fill(old: Runtime, new: Runtime, identity: str) -> None:
    """Build the actors of ``new`` and let them have the layers of ``old``."""
    deployment = new.deployment
    create_actors(new, identity, lambda name: {})
    states = optimizer_states(old) if old.deployment.shard or deployment.shard else {}
    released = _released(old, new)
    new.driver.collect({name: new.driver.call(name, ReceiveLayers(blobs)) for name, blobs in released.items()})
    infos: Mapping[str, Mapping[int, StageInfo]] = new.driver.collect(
        {name: new.driver.call(name, repartition(deployment, name, states)) for name in new.names}
    )
    if new.settings.trains:
        check_groups({worker: list(stages.values()) for worker, stages in infos.items()})
    new.install(deployment, infos)
    new.succession.begin(infos)


def _released(old: Runtime, new: Runtime) -> dict[str, list[bytes]]:
    """Return by worker of ``new`` the pickled layers that it is to hold, from the first replica of ``old``."""
    moves: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    targets = list(zip(*(owners.items() for owners in new.deployment.owners()), strict=True))
    source = old.deployment.owners()[0]
    for rows in targets:
        layer = rows[0][0]
        moves.setdefault((source[layer], tuple(name for _, name in rows)), []).append(layer)
    given: dict[str, list[bytes]] = {name: [] for name in new.names}
    for (holder, takers), layers in moves.items():
        blob = old.driver.control(holder, ReleaseLayers(layers))
        for taker in takers:
            given[taker].append(blob)
    return given


def _hand_over(old: Runtime, new: Runtime) -> None:
    """Let ``new`` be what ``old`` was for the user, and free the actors of ``old``."""
    new.trained, new.loss_is_mean, new.parts = old.trained, old.loss_is_mean, old.parts
    new.callbacks, new.tracer, new.offsets = old.callbacks, None, dict.fromkeys(new.names, 0)
    new.events = old.events
    new.note_event("resized", f"{len(old.names)} → {len(new.names)} workers, {len(new.stages)} stages")
    if new.settings.trains:
        new.optimizer = old.optimizer
        new.optimizer.serve(new)
    old.callbacks = []  # theirs is the new one's to close
    old.close()
    new.cluster.relabel()
    new.history.tick()
