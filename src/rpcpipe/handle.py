"""A stage as the driver sees it: what ``pipe.stages[k]`` is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rpcpipe import tables
from rpcpipe.driver import Driver
from rpcpipe.errors import RpcPipeError
from rpcpipe.microbatch import Nest
from rpcpipe.pickling import dumps, loads

HEADER = ("stage", "worker", "device", "layers", "parameters", "weights", "busy in the last step")


class StageHandle:
    """Stage ``index``, on worker ``worker``."""

    def __init__(self, driver: Driver, index: int, worker: str, info: Mapping[str, Any]) -> None:
        self.index = index
        self.worker = worker
        self.layers: list[str] = info["layers"]
        self.sizes: dict[str, int] = info["sizes"]
        self._info = info
        self._driver = driver

    def __repr__(self) -> str:
        number, worker, device, names, parameters, size, _ = self.row(None)
        return f"stage {number} on {worker} ({device}): layers {names}, {parameters} parameters, {size}"

    def row(self, busy: float | None) -> list[str]:
        """The cells below ``HEADER``; ``busy``: its worker's share of the last step."""
        info = self._info
        names = self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]} … {self.layers[-1]}"
        share = "-" if busy is None else f"{busy:.1%}"
        size = tables.mebibytes(info["bytes"])
        return [str(self.index), self.worker, info["device"], names, f"{info['parameters']:,}", size, share]

    @property
    def rref(self) -> Any:
        """An RRef to the stage's module, on its worker."""
        return self._driver.hold(self.worker, "module", self.index)

    def call(self, function: Callable[[nn.Module], Any]) -> Any:
        """``function(module)`` on the stage's worker; it may change the weights."""
        return loads(self._driver.control(self.worker, "call", self.index, dumps(function, "the call's function")))

    def forward(self, inputs: Nest) -> Any:
        """An RRef to the module's output for ``inputs``: a nest of tensors, or another RRef.

        Inside ``dist_autograd.context()`` its graph is recorded across the workers. Raises RpcPipeError
        for a stage with Wired layers: what they take does not come by hand.
        """
        if self._info["wired"]:
            raise RpcPipeError(
                f"stage {self.index} has layers that take or give named values; it runs in steps only (train_step,"
                " evaluate, pipe(inputs)), or by pipe.stages[k].call(function)"
            )
        return self._driver.chain(self.worker, self.index, inputs)

    def parameter_rrefs(self) -> list[Any]:
        """An RRef to every trainable parameter of the stage."""
        return [self._driver.hold(self.worker, "parameter", self.index, name) for name in self._info["trainable"]]
