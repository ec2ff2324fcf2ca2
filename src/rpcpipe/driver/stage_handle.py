"""A stage as the driver sees it: what ``pipe.stages[k]`` is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rpcpipe import _tables
from rpcpipe.driver.driver import Driver
from rpcpipe.errors import RpcPipeError
from rpcpipe.model.microbatch import Nest
from rpcpipe.transport.pickling import dumps, loads
from rpcpipe.worker.messages import StageInfo
from rpcpipe.worker.operations import CallModule, GetModule, GetParameter

HEADER = ("stage", "worker", "device", "layers", "parameters", "weights", "busy in the last step")


class StageHandle:
    """Stage ``index``, on worker ``worker``; with replicas on all of ``workers``, of which that is the first.

    ``infos``: what each of them says of it.
    """

    def __init__(self, driver: Driver, index: int, infos: Mapping[str, StageInfo]) -> None:
        self.index = index
        self.workers = tuple(infos)
        self.worker = self.workers[0]
        self._infos = infos
        self._info = infos[self.worker]
        self.layers: list[str] = self._info.layers
        self.sizes: dict[str, int] = self._info.sizes
        self.buckets: list[int] = self._info.buckets
        self.trainable: list[str] = self._info.trainable
        self.buffered: bool = self._info.buffered
        self._driver = driver

    def __repr__(self) -> str:
        _, _, device, names, parameters, size, _ = self.rows({})[0]
        workers = ", ".join(self.workers)
        return f"stage {self.index} on {workers} ({device}): layers {names}, {parameters} parameters, {size}"

    def rows(self, busy: Mapping[str, float]) -> list[list[str]]:
        """The cells below ``HEADER``, a row for each replica; ``busy``: workers' shares of the last step."""
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
    def rref(self) -> Any:
        """An RRef to the stage's module, on its worker."""
        return self._driver.remote(self.worker, GetModule(self.index))

    def call(self, function: Callable[[nn.Module], Any]) -> Any:
        """``function(module)`` on the stage's worker; it may change the weights.

        With replicas it runs on all of them, with random numbers seeded alike, so that they stay the same;
        the result is the first one's.
        """
        data = dumps(function, "the call's function")
        seed = None if len(self.workers) == 1 else int(torch.randint(1 << 62, ()))
        replies = {worker: self._driver.call(worker, CallModule(self.index, data, seed)) for worker in self.workers}
        return loads(self._driver.collect(replies)[self.worker])

    def forward(self, inputs: Nest) -> Any:
        """An RRef to the module's output for ``inputs``: a nest of tensors, or another RRef.

        Inside ``dist_autograd.context()`` its graph is recorded across the workers. Raises RpcPipeError
        for a stage with Wired layers: what they take does not come by hand.
        """
        if self._info.wired:
            raise RpcPipeError(
                f"stage {self.index} has layers that take or give named values; it runs in steps only (train_step,"
                " evaluate, pipe(inputs)), or by pipe.stages[k].call(function)"
            )
        return self._driver.remote_chained(self.worker, self.index, inputs)

    def parameter_rrefs(self) -> list[Any]:
        """An RRef to every trainable parameter of the stage, on every replica: beside all lie the same gradients."""
        if self._info.sharded:
            raise RpcPipeError(
                "with shard_optimizer=True a gradient lies on one replica only and s.optimize() spreads the new"
                " weights; for an optimizer of your own make the pipeline with shard_optimizer=False"
            )
        return [
            self._driver.remote(worker, GetParameter(self.index, name))
            for worker in self.workers
            for name in self.trainable
        ]
