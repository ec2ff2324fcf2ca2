"""Names of layers, and of their parameters and buffers in the whole model's ``state_dict``."""

from __future__ import annotations

# In the name of a layer whose module has its tensors under their whole names: "conv1:relu" has conv1.weight.
FREE = ":"


def full_name(layer: str, key: str) -> str:
    """Return the name in the whole model of what a layer's module calls ``key``."""
    return f"{prefix_of(layer)}{key}"


def prefix_of(layer: str) -> str:
    """Return what the names of a layer's tensors begin with in the whole model."""
    return "" if FREE in layer else f"{layer}."
