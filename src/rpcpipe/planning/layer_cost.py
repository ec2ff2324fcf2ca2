"""The costs of one layer in seconds and bytes, from which all plans are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# What an update can be taken back from (``Pipeline(undo=…)``), the preferred one first.
UNDO = ("copy", "off")


@dataclass(frozen=True)
class LayerCost:
    """The costs of one layer for one micro-batch: seconds (medians of warm runs, or estimates) and bytes.

    ``backward`` is the whole backward, ``input_gradient`` and ``weight_gradient`` are its halves run separately.
    ``activation_bytes`` is what autograd saves, ``output_bytes`` what goes to the next layer. ``update``:
    seconds of the gradients' norms and the optimizer, 0 where none was given. ``state_bytes``: those of the optimizer's
    state, None where it was not measured. ``peak_bytes``: the most that a forward and its backward have at once beside
    parameters and their gradients, 0 where it was not measured.
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
    state_bytes: int | None = None
    peak_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Seconds of one forward and backward."""
        return self.forward + self.backward

    def bytes(self, undo: str = "copy") -> int:
        """Return the bytes on a worker that trains with Adam and holds one micro-batch's activations."""
        held = self.parameter_bytes + 2 * self.parameter_bytes
        return self.parameter_bytes + held * (1 + (undo == "copy")) + self.activation_bytes


_SECONDS = ("forward", "backward", "input_gradient", "weight_gradient", "update")


def mean_costs(measurements: Sequence[Sequence[LayerCost]]) -> list[LayerCost]:
    """Return the mean seconds of several measurements of the same layers."""
    return [
        replace(same[0], **{name: sum(getattr(layer, name) for layer in same) / len(same) for name in _SECONDS})
        for same in zip(*measurements, strict=True)
    ]


def balancing_costs(layers: Sequence[LayerCost], criterion: str, undo: str = "copy") -> list[float]:
    """Return by layer the figure that ``balance="time"`` or ``"memory"`` equalises, in seconds or bytes."""
    figures: dict[str, Callable[[LayerCost], float]] = {
        "time": lambda layer: layer.seconds,
        "memory": lambda layer: float(layer.bytes(undo)),
    }
    return [figures[criterion](layer) for layer in layers]
