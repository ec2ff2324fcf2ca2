"""Brings a pipeline's layers to its workers."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import cloudpickle

from rpcpipe.driver.feeding import groups, hops
from rpcpipe.driver.program import Program
from rpcpipe.driver.stage_handle import StageHandle
from rpcpipe.model.layers import Layer
from rpcpipe.model.microbatch import Nest
from rpcpipe.pipeline.arguments import check_groups, refuse, stage_parts
from rpcpipe.planning.layer_cost import LayerProfile
from rpcpipe.stage.optimizer import PipelineOptimizer
from rpcpipe.stage.profiler import profile
from rpcpipe.transport.pickling import dumps
from rpcpipe.worker.gradient_exchange import Peers
from rpcpipe.worker.stage_set import ActorSpec

if TYPE_CHECKING:
    from rpcpipe.pipeline.pipeline import Pipeline


def measure(pipe: Pipeline, layers: OrderedDict[str, Layer], sample: Nest, seed: int) -> list[LayerProfile]:
    """Every layer's costs on the first worker for ``sample``, one micro-batch of inputs."""
    refuse(sample is None, "balance='time' or 'memory' needs sample=…: one micro-batch of inputs to run the layers on")
    first = pipe.cluster.workers[0]
    return list(pipe.cluster.call(first, functools.partial(profile, seed=seed, device=first.device), layers, sample))


def create(pipe: Pipeline, identity: str, layers: OrderedDict[str, Layer], common: ActorSpec) -> None:
    """Build every worker's stages; one worker's layers are pickled at a time."""
    dumps((common.loss, common.optimizer), "loss and optimizer")  # for its warning alone: they go with the layers
    replies = {}
    for name in pipe._names:
        worker, replica = pipe._layout.index(name)
        mine = {
            stage: (OrderedDict((key, layers[key]) for key in keys), first)
            for stage, (keys, first) in stage_parts(pipe._layers, pipe.balance).items()
            if pipe.schedule.placement[stage] == worker
        }
        peers = Peers(pipe._layout.column(worker), replica, pipe._shard)
        spec = cloudpickle.dumps(dataclasses.replace(common, stages=mine, peers=peers))
        replies[name] = pipe.cluster.transport.call(name, "create", identity, spec)
    found = pipe._driver.collect(replies)
    adopt(pipe, found)
    groups = [info["groups"] for stages in found.values() for info in stages.values() if info["groups"]]
    check_groups(groups)
    pipe.optimizer = PipelineOptimizer(groups[0], pipe._apply_open, pipe._forget_accumulated)


def adopt(pipe: Pipeline, found: Mapping[str, Mapping[int, Any]]) -> None:
    """Take note of what the workers say they hold."""
    pipe.stages = tuple(
        StageHandle(pipe._driver, stage, {name: found[name][stage] for name in pipe._layout.column(holder)})
        for stage, holder in enumerate(pipe.schedule.placement)
    )
    renew(pipe)
    pipe.cluster.relabel()


def renew(pipe: Pipeline) -> None:
    """The calls of its steps, for the schedule that it has now."""
    pipe._program = Program(pipe.schedule, pipe._layout, hops(pipe), groups(pipe), shard=pipe._shard)
