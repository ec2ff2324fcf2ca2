"""A stage as the driver sees it: what ``pipe.stages[k]`` is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle
from torch import nn

from rpcpipe.driver import Driver
from rpcpipe.microbatch import Nest


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
        names = self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]} … {self.layers[-1]}"
        info = self._info
        size = f"{info['parameters']:,} parameters, {info['bytes'] / 2**20:.1f} MiB"
        return f"stage {self.index} on {self.worker} ({info['device']}): layers {names}, {size}"

    @property
    def rref(self) -> Any:
        """An RRef to the stage's module, on its worker."""
        return self._driver.hold(self.worker, "module", self.index)

    def call(self, function: Callable[[nn.Module], Any]) -> Any:
        """``function(module)`` on the stage's worker; it may change the weights."""
        return cloudpickle.loads(self._driver.control(self.worker, "call", self.index, cloudpickle.dumps(function)))

    def forward(self, inputs: Nest) -> Any:
        """An RRef to the module's output for ``inputs``: a nest of tensors, or another RRef.

        Inside ``dist_autograd.context()`` its graph is recorded across the workers.
        """
        return self._driver.chain(self.worker, self.index, inputs)

    def parameter_rrefs(self) -> list[Any]:
        """An RRef to every trainable parameter of the stage."""
        return [self._driver.hold(self.worker, "parameter", self.index, name) for name in self._info["trainable"]]
