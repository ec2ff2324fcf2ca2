"""Where a step's batch comes from: this process cuts it and sends it, or workers read it (``RemoteBatches``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rpcpipe.driver.remote_batches import RemoteValue
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.succession import healed
from rpcpipe.model.batch import Batch
from rpcpipe.model.layers import check_inputs
from rpcpipe.model.microbatch import Nest

T = TypeVar("T")


def cut_pair(runtime: Runtime, inputs: Nest, targets: Nest) -> tuple[Batch, list[Nest]]:
    """Return a batch in micro-batches, and its targets.

    Raises ArgumentError for what cannot be cut or sent, if a named value is missing, or if inputs and targets differ in
    size; and what reading RemoteBatches raises.
    """
    if isinstance(inputs, RemoteValue) or isinstance(targets, RemoteValue):
        return _read(runtime, lambda: runtime.readers.cut(runtime.deployment, inputs, targets))
    batch = runtime.program.cut(inputs)
    parts = runtime.program.cut_targets(runtime.prepare(targets), batch)
    check_inputs(batch.parts[0], runtime.deployment.wirings)
    return batch, parts


def cut_outputs(runtime: Runtime, inputs: Nest, targets: Nest | None) -> tuple[Batch, list[Nest] | None]:
    """Return a batch whose outputs are wanted; ``targets``, if any, as the last stage gets them. Raises as above."""
    if isinstance(inputs, RemoteValue):
        return _read(runtime, lambda: runtime.readers.cut_inputs(runtime.deployment, inputs)), None
    batch = runtime.program.cut(inputs)
    parts = None if targets is None else runtime.program.cut_targets(targets, batch)
    check_inputs(batch.parts[0], runtime.deployment.wirings)
    return batch, parts


def has(runtime: Runtime, inputs: RemoteValue) -> bool:
    """Return whether there is the batch of ``inputs``, which workers have read then; raises what reading raises."""
    return _read(runtime, lambda: runtime.readers.has(runtime.deployment, inputs))


def _read(runtime: Runtime, call: Callable[[], T]) -> T:
    """Return ``call()``, in which workers read; made again if one dies in it, unless it is part of what will be."""
    return call() if runtime.active is not None else healed(runtime.cluster, runtime.mend, call)
