"""The workers that a plan is for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rpcpipe.planning.loss_cost import Healing
from rpcpipe.planning.overheads import Overheads


@dataclass(frozen=True)
class Machine:
    """Identical workers: ``memory`` in bytes of each, ``latency`` in seconds and ``bandwidth`` in bytes/s between two.

    ``cores``: the number that all workers share. ``moments``: the optimizer's state in copies of the parameters.
    ``overheads``: what a step takes beside its layers. ``healing``: for which workers hold more.
    """

    workers: int
    memory: float = math.inf
    latency: float = 0.0
    bandwidth: float = math.inf
    cores: int | None = None
    moments: int = 2
    overheads: Overheads = field(default_factory=Overheads)
    healing: Healing = field(default_factory=Healing)
