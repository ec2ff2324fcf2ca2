"""The driver's handle to a stage: the type of ``pipe.stages[k]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rpcpipe import _tables
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.turn import Turn, in_turn
from rpcpipe.errors import StateError
from rpcpipe.model.microbatch import Nest, map_tensors
from rpcpipe.model.sendable import as_argument, sendable
from rpcpipe.transport.user_pickling import loads, named_dumps
from rpcpipe.worker.messages import StageInfo
from rpcpipe.worker.operations import CallModule, GetModule, GetParameter

HEADER = ("stage", "worker", "device", "layers", "parameters", "weights", "busy in the last step")


class StageHandle:
    """Stage ``index`` on worker ``worker``, with replicas on all of ``workers``, the first of which is ``worker``.

    ``infos``: by worker, the description of the stage. ``execute`` executes an operation on workers, whatever becomes
    of them, and returns the results.
    """

    def __init__(
        self,
        driver: Driver,
        index: int,
        infos: Mapping[str, StageInfo],
        execute: Callable[[Sequence[str], CallModule], Mapping[str, Any]],
        turn: Turn,
    ) -> None:
        self.index, self.turn = index, turn
        self.workers = tuple(infos)
        self.worker = self.workers[0]
        self._infos = infos
        self._info = infos[self.worker]
        self.layers: list[str] = self._info.layers
        self.sizes: dict[str, int] = self._info.sizes
        self.buckets: list[int] = self._info.buckets
        self.trainable: list[str] = self._info.trainable
        self.buffered: bool = self._info.buffered
        self._driver, self._execute = driver, execute

    def __repr__(self) -> str:
        _, _, device, names, parameters, size, _ = self.rows({})[0]
        workers = ", ".join(self.workers)
        return f"stage {self.index} on {workers} ({device}): layers {names}, {parameters} parameters, {size}"

    def rows(self, busy: Mapping[str, float]) -> list[list[str]]:
        """Return the cells below ``HEADER``, one row per replica; ``busy``: workers' busy shares of the last step."""
        names = self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]} … {self.layers[-1]}"
        several = len(self.workers) > 1
        return [
            [
                f"{self.index} of replica {replica}" if several else str(self.index), worker, info.device, names,
                f"{info.parameters:,}", _tables.mebibytes(info.bytes),
                f"{busy[worker]:.1%}" if worker in busy else "-",
            ]
            for replica, (worker, info) in enumerate(self._infos.items())
        ]  # fmt: skip

    @property
    @in_turn
    def rref(self) -> Any:
        """An RRef to the stage's module, on its worker."""
        return self._driver.remote(self.worker, GetModule(self.index))

    @in_turn
    def call(self, function: Callable[[nn.Module], Any]) -> Any:
        """Return ``function(module)``, run on the stage's worker; the function may change the weights.

        With replicas the function runs on all of them, with equal seeds of random numbers, so that the replicas stay
        equal; the result is the first replica's.
        """
        data = named_dumps(function, "the call's function")
        seed = None if len(self.workers) == 1 else int(torch.randint(1 << 62, ()))
        return loads(self._execute(self.workers, CallModule(self.index, data, seed))[self.worker])

    @in_turn
    def forward(self, inputs: Nest) -> Any:
        """Return an RRef to the module's output for ``inputs``: a nest of tensors, or another RRef.

        Inside ``dist_autograd.context()`` the autograd graph is recorded across the workers. Raises ArgumentError for
        a tensor that cannot be sent, StateError for a stage with Wired layers, whose named values only a step delivers.
        """
        if self._info.wired:
            raise StateError(
                f"stage {self.index} has layers that take or give named values; it runs in steps only (train_step,"
                " evaluate, pipe(inputs)), or by pipe.stages[k].call(function)"
            )
        with as_argument():
            sent = map_tensors(lambda tensor: sendable(tensor, "the stage's input").cpu(), inputs)
        return self._driver.remote_chained(self.worker, self.index, sent)

    @in_turn
    def parameter_rrefs(self) -> list[Any]:
        """Return an RRef to every trainable parameter of the stage on every replica; all replicas' gradients are equal.

        Raises StateError if the optimizer is sharded.
        """
        if self._info.sharded:
            raise StateError(
                "with shard_optimizer=True a gradient lies on one replica only and s.optimize() spreads the new"
                " weights; for an optimizer of your own make the pipeline with shard_optimizer=False"
            )
        return [
            self._driver.remote(worker, GetParameter(self.index, name))
            for worker in self.workers
            for name in self.trainable
        ]
