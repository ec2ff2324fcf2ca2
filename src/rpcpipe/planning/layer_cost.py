"""What a layer costs, and what a worker's memory is made of: the planner's currency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


def copies(moments: int, shards: int = 1) -> float:
    """How often a worker holds its parameters: weights, gradient, ``moments`` of the optimizer (Adam's
    are 2), and the copy of weights and moments with which a failed step is taken back. Of the last two it
    holds one of ``shards`` parts where the optimizer is sharded."""
    return 2 + (moments + 1 + moments) / shards


@dataclass(frozen=True)
class LayerProfile:
    """One layer for one micro-batch: seconds (medians of warm runs, or estimates) and bytes.

    ``backward`` is the whole one; ``input_gradient`` and ``weight_gradient`` its halves, run one by one.
    ``activation_bytes`` is what autograd saves, ``output_bytes`` what goes to the next layer. ``update``:
    seconds of the optimizer, 0 where none was given.
    """

    name: str
    forward: float
    backward: float
    input_gradient: float
    weight_gradient: float
    activation_bytes: int
    parameter_bytes: int
    output_bytes: int
    update: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    @property
    def bytes(self) -> int:
        """Of a worker that trains with Adam, and of one micro-batch's activations."""
        return round(copies(moments=2)) * self.parameter_bytes + self.activation_bytes


_SECONDS = ("forward", "backward", "input_gradient", "weight_gradient", "update")


def mean(found: Sequence[Sequence[LayerProfile]]) -> list[LayerProfile]:
    """Of several profiles of the same layers, the mean seconds."""
    return [
        replace(same[0], **{name: sum(getattr(layer, name) for layer in same) / len(same) for name in _SECONDS})
        for same in zip(*found, strict=True)
    ]


def costs(profiles: Sequence[LayerProfile], what: str) -> list[float]:
    """What ``balance="time"`` or ``"memory"`` equalises."""
    of: Callable[[LayerProfile], float] = {"time": lambda p: p.seconds, "memory": lambda p: float(p.bytes)}[what]
    return [of(layer) for layer in profiles]
