"""The costs of one layer in seconds and bytes, from which all plans are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


def parameter_copies(moments: int, shards: int = 1) -> float:
    """Return how many times the bytes of its parameters a worker holds.

    These are weights, gradient, ``moments`` of the optimizer (Adam has 2), and the copy of weights and
    moments from which a failed step is rolled back. Of moments and copy a worker holds one of ``shards``
    parts where the optimizer is sharded.
    """
    return 2 + (moments + 1 + moments) / shards


def state_copies(moments: int, shards: int = 1) -> float:
    """Return how many times the bytes of its parameters the weights and moments take, which cannot be made anew."""
    return 1 + moments / shards


@dataclass(frozen=True)
class LayerCost:
    """The costs of one layer for one micro-batch: seconds (medians of warm runs, or estimates) and bytes.

    ``backward`` is the whole backward, ``input_gradient`` and ``weight_gradient`` are its halves run separately.
    ``activation_bytes`` is what autograd saves, ``output_bytes`` what goes to the next layer. ``update``:
    seconds of the gradients' norms and the optimizer, 0 where none was given.
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
        """Seconds of one forward and backward."""
        return self.forward + self.backward

    @property
    def bytes(self) -> int:
        """Bytes on a worker that trains with Adam and holds one micro-batch's activations."""
        return round(parameter_copies(moments=2)) * self.parameter_bytes + self.activation_bytes


_SECONDS = ("forward", "backward", "input_gradient", "weight_gradient", "update")


def mean_costs(measurements: Sequence[Sequence[LayerCost]]) -> list[LayerCost]:
    """Return the mean seconds of several measurements of the same layers."""
    return [
        replace(same[0], **{name: sum(getattr(layer, name) for layer in same) / len(same) for name in _SECONDS})
        for same in zip(*measurements, strict=True)
    ]


def balancing_costs(layers: Sequence[LayerCost], criterion: str) -> list[float]:
    """Return by layer the figure that ``balance="time"`` or ``"memory"`` equalises, in seconds or bytes."""
    figures: dict[str, Callable[[LayerCost], float]] = {
        "time": lambda layer: layer.seconds,
        "memory": lambda layer: float(layer.bytes),
    }
    return [figures[criterion](layer) for layer in layers]
