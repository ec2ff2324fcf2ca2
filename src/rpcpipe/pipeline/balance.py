"""Cuts of a model into stages, as functions of their own: layers per stage, for ``Pipeline(balance=…)``."""

from __future__ import annotations

from rpcpipe.model.layers import Model, named_layers, parameter_counts
from rpcpipe.model.microbatch import Nest
from rpcpipe.planning import partition
from rpcpipe.planning.layer_cost import balancing_costs
from rpcpipe.stage.profiler import profile


def balance_by_parameters(model: Model, stages: int) -> list[int]:
    """The largest stage's parameters are as few as possible. Builds LayerSpecs on the meta device.

    Raises PartitionError if the model has fewer layers than ``stages``.
    """
    return partition.balance(parameter_counts(named_layers(model)), stages)


def balance_by_time(model: Model, stages: int, sample: Nest) -> list[int]:
    """The slowest stage's forward and backward are as short as possible; runs every layer here.

    ``sample``: one micro-batch of inputs. ``Pipeline(balance="time", sample=…)`` measures on a worker.
    """
    return _measured(model, stages, sample, "time")


def balance_by_memory(model: Model, stages: int, sample: Nest) -> list[int]:
    """The largest stage's memory is as small as possible: seven times its parameters (gradient, Adam's
    moments, and the copy with which a failed step is taken back) and the activations of ``sample``,
    one micro-batch of inputs."""
    return _measured(model, stages, sample, "memory")


def _measured(model: Model, stages: int, sample: Nest, what: str) -> list[int]:
    measured = profile(named_layers(model), sample)
    sends = [layer.output_bytes for layer in measured]
    return partition.balance(balancing_costs(measured, what), stages, communication=sends)
